"""Converts the form's values, as a browser sends them, to a recipe and back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from hyper_merge.errors import RecipeError
from hyper_merge.hosts.host import require_listed_file
from hyper_merge.recipe.fields import AVERAGE
from hyper_merge.recipe.plain_values import plain_value
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runs.folders import Folders
from hyper_merge.runtime.checked_json import parse_json
from hyper_merge.ui.form_fields import (
    ALLOCATION_CHOICES,
    BASE_AVERAGE,
    DAMAGED_CHOICES,
    DIFFERENCE_CHOICES,
    EXACT_CHOICES,
    LABELS,
    VAE_CHOICES,
)

# what ends with a unit is meant as a size, whatever stands before it
_SIZE: Final = re.compile(r".*(?<![a-z])([kmg]i?b?|b)", re.IGNORECASE)


@dataclass(frozen=True)
class Form:
    """Every value of the form, in the order of its widgets."""

    checkpoints: list[str]
    name: str
    ranks: str
    weights: str
    block_weights: str
    base: str
    dtype: str
    lora_dtype: str
    device: str
    iterations: float | None
    tolerance: float | None
    seed: float | None
    memory: str
    vae: str
    exact: str
    topup: str
    allocation: str
    separate: bool
    fit_weights: str
    layer_weights: str
    training: str
    damaged: str
    save_styles: bool

    @classmethod
    def from_widgets(cls, picked: str, *values: Any) -> Form:
        """Returns the form of the widgets' values: the picked checkpoints are JSON there."""
        return cls(parse_picks(picked), *values)

    def widget_values(self) -> tuple[Any, ...]:
        """Returns the values for the widgets, in their order."""
        picked, *values = (getattr(self, field.name) for field in fields(self))
        return (json.dumps(picked), *values)


def parse_picks(text: str) -> list[str]:
    """Returns the names in a browser's list of picked checkpoints; none in anything else."""
    try:
        names = parse_json(text or "[]")
    except ValueError:
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def chosen_files(form: Form, listed: Mapping[str, Path]) -> tuple[Path, ...]:
    """Returns the files of the chosen checkpoints; looks up names of the host's list only.

    Raises:
        CheckpointError: a name is not in the list (any more).
    """
    return tuple(require_listed_file(name, listed) for name in form.checkpoints)


def recipe_from_form(form: Form, listed: Mapping[str, Path], folders: Folders) -> Recipe:
    """Returns the recipe that the form describes.

    Raises:
        RecipeError: a field has no valid value; the message begins with its label.
        CheckpointError: a name is not in the host's list.
    """
    size = size_key(form.ranks or "")
    models = chosen_files(form, listed)
    if size != "ranks" and ALLOCATION_CHOICES.get(form.allocation) != "adaptive":
        raise RecipeError(
            "a size or a share requires adaptive rank allocation",
            hint="choose it under Advanced, or enter ranks",
            where=LABELS["ranks"],
            key=size,
        )
    values: dict[str, object] = {
        size: plain_value(form.ranks or ""),
        "weights": plain_value(form.weights or ""),
        "block_weights": split_lines(form.block_weights) or None,
        "topup": plain_value(form.topup or ""),
        "fit_weights": plain_value(form.fit_weights or ""),
        "name": form.name,
        "models": models,
        "base": AVERAGE
        if form.base == BASE_AVERAGE
        else str(require_listed_file(form.base, listed)),
        "dtype": form.dtype,
        "lora_dtype": form.lora_dtype,
        "device": form.device,
        "iterations": _whole(form.iterations),
        "tolerance": form.tolerance,
        "seed": _whole(form.seed),
        "memory": plain_value(form.memory or ""),
        "vae": VAE_CHOICES.get(form.vae, form.vae),
        "exact": EXACT_CHOICES.get(form.exact, form.exact),
        "allocation": ALLOCATION_CHOICES.get(form.allocation, form.allocation),
        "multipliers": "separate" if form.separate else "shared",
        "layer_weights": DIFFERENCE_CHOICES.get(form.layer_weights, form.layer_weights),
        "training": plain_value(form.training or "0"),
        "damaged": DAMAGED_CHOICES.get(form.damaged, form.damaged),
        "output": folders.models.parent,
    }
    return Recipe.parse(values, lambda key: LABELS.get(key, key))


def form_from_recipe(recipe: Recipe, listed: Mapping[str, Path], *, save_styles: bool) -> Form:
    """Returns the form that describes a recipe, without checkpoints that are no longer listed."""
    names = {path.resolve(): name for name, path in listed.items()}
    base = BASE_AVERAGE
    if recipe.base != AVERAGE:
        base = names.get(Path(recipe.base).resolve(), BASE_AVERAGE)
    checkpoints = [names.get(path.resolve()) for path in recipe.models]
    return Form(
        checkpoints=[name for name in checkpoints if name is not None],
        name=recipe.name,
        ranks=format_requested_size(recipe),
        weights=_format_numbers(recipe.weights),
        block_weights="\n".join(
            ",".join(f"{x:.12g}" for x in row) for row in recipe.block_weights or ()
        ),
        base=base,
        dtype=recipe.dtype,
        lora_dtype=recipe.lora_dtype,
        device=recipe.device,
        iterations=recipe.iterations,
        tolerance=recipe.tolerance,
        seed=recipe.seed,
        memory=_format_size(recipe.memory),
        vae=_choice_text(VAE_CHOICES, recipe.vae),
        exact=_choice_text(EXACT_CHOICES, recipe.exact),
        topup="" if recipe.topup is None else str(recipe.topup),
        allocation=_choice_text(ALLOCATION_CHOICES, recipe.allocation),
        separate=recipe.multipliers == "separate",
        fit_weights=_format_numbers(recipe.fit_weights),
        layer_weights=_choice_text(DIFFERENCE_CHOICES, recipe.layer_weights),
        training=str(recipe.training),
        damaged=_choice_text(DAMAGED_CHOICES, recipe.damaged),
        save_styles=save_styles,
    )


def format_requested_size(recipe: Recipe) -> str:
    """Returns the text of the field of ranks: a list of ranks, a size, or a share."""
    if recipe.target is not None:
        return f"{recipe.target * 100:.12g} %"
    if recipe.budget is not None:
        return _format_size(recipe.budget)
    return ", ".join(map(str, recipe.ranks))


def size_key(text: str) -> str:
    """Returns the setting that the text in the field of ranks stands for."""
    if "%" in text:
        return "target"
    return "budget" if _SIZE.fullmatch(text.strip()) else "ranks"


def _choice_text(choices: Mapping[str, str], value: str) -> str:
    return next(text for text, choice in choices.items() if choice == value)


def _format_size(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e6:.12g} MB"


def _format_numbers(values: Sequence[float] | None) -> str:
    return "" if values is None else ", ".join(f"{x:g}" for x in values)


def split_lines(text: str | None) -> list[str]:
    """Returns the lines of a field that hold anything."""
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def _whole(value: float | None) -> float | None:
    """Returns a whole number as an int, since browsers send it as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
