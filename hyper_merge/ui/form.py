"""The form's values, as a browser sends them, and the recipe that they ask for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hyper_merge.errors import RecipeError
from hyper_merge.hosts.host import require_listed_file
from hyper_merge.recipe.recipe import AVERAGE, FIELDS, Recipe, SettingError
from hyper_merge.runs.folders import Folders

_SIZE: Final = re.compile(r"[\d.]+\s*([kmg]i?b?|b)", re.IGNORECASE)

BASE_AVERAGE: Final = "the average of the checkpoints"
VAE_CHOICES: Final = {"of the first checkpoint": "first", "average of all": "average"}
EXACT_CHOICES: Final = {
    "no": "none",
    "norms (A1111, Forge, ComfyUI)": "norms",
    "norms and biases (Forge, ComfyUI)": "all",
}
ALLOCATION_CHOICES: Final = {
    "where they bring back most": "adaptive",
    "the same in every layer": "even",
}
DIFFERENCE_CHOICES: Final = {
    "relative to each layer's size": "relative",
    "as they are": "plain",
}
_SPREAD: Final = next(iter(ALLOCATION_CHOICES))
PRESETS: Final = {
    "small": "64, 32, 16",
    "medium": "128, 64, 32, 16",
    "large": "256, 128, 64, 32",
}

LABELS: Final = {
    "name": "Name",
    "models": "Checkpoints",
    "ranks": "Ranks",
    "weights": "Weights",
    "base": "Base",
    "dtype": "Stored precision",
    "lora_dtype": "Stored precision of the LoRAs",
    "device": "Device",
    "iterations": "Iterations",
    "tolerance": "Tolerance",
    "seed": "Seed",
    "vae": "VAE",
    "exact": "Companion LoRAs",
    "budget": "Ranks",
    "target": "Ranks",
    "topup": "Private LoRAs",
    "allocation": "Ranks go",
    "multipliers": "Separate multipliers for the text encoder",
    "fit_weights": "Weights of the fit",
    "layer_weights": "Differences count",
}
"""What the form calls a recipe's settings."""


@dataclass(frozen=True)
class Form:
    """Every value of the form, in the order of its widgets."""

    checkpoints: list[str]
    name: str
    ranks: str
    weights: str
    base: str
    dtype: str
    lora_dtype: str
    device: str
    iterations: float | None
    tolerance: float | None
    seed: float | None
    vae: str
    exact: str
    topup: str
    allocation: str
    separate: bool
    fit_weights: str
    layer_weights: str
    save_styles: bool


def chosen(form: Form, listed: Mapping[str, Path]) -> tuple[Path, ...]:
    """Files of the chosen checkpoints; only names of the host's list are ever looked up.

    Raises:
        CheckpointError: a name is not in the list (any more).
    """
    return tuple(require_listed_file(name, listed) for name in form.checkpoints or [])


def recipe_of(form: Form, listed: Mapping[str, Path], folders: Folders) -> Recipe:
    """The recipe that the form asks for.

    Raises:
        RecipeError: a field cannot be; the message begins with its label.
        CheckpointError: a name is not in the host's list.
    """
    texts = {
        _size_key(form.ranks or ""): form.ranks,
        "weights": form.weights,
        "topup": form.topup,
        "fit_weights": form.fit_weights,
    }
    words: dict[str, Any] = {
        field.name: field.from_text(texts[field.name] or "")
        for field in FIELDS
        if field.name in texts
    }
    models = chosen(form, listed)
    if "ranks" not in words and form.allocation != _SPREAD:
        raise RecipeError(
            f"{LABELS['ranks']}: a size or a share needs ranks that go {_SPREAD}; choose that under"
            " Advanced, or give ranks"
        )
    try:
        return Recipe(
            **words,
            name=form.name,
            models=models,
            base=AVERAGE
            if form.base == BASE_AVERAGE
            else str(require_listed_file(form.base, listed)),
            dtype=form.dtype,  # type: ignore[arg-type]
            lora_dtype=form.lora_dtype,  # type: ignore[arg-type]
            device=form.device,
            iterations=_whole(form.iterations),
            tolerance=form.tolerance,  # type: ignore[arg-type]
            seed=_whole(form.seed),
            vae=VAE_CHOICES.get(form.vae, form.vae),  # type: ignore[arg-type]
            exact=EXACT_CHOICES.get(form.exact, form.exact),  # type: ignore[arg-type]
            allocation=ALLOCATION_CHOICES.get(form.allocation, form.allocation),  # type: ignore[arg-type]
            multipliers="separate" if form.separate else "shared",
            layer_weights=DIFFERENCE_CHOICES.get(form.layer_weights, form.layer_weights),  # type: ignore[arg-type]
            output=folders.models.parent,
        )
    except SettingError as error:
        raise RecipeError(f"{LABELS.get(error.key, error.key)}: {error.problem}") from None


def form_of(recipe: Recipe, listed: Mapping[str, Path], *, save_styles: bool) -> Form:
    """The form that asks for a recipe; checkpoints that are no longer listed are left out."""
    names = {path.resolve(): name for name, path in listed.items()}
    base = BASE_AVERAGE
    if recipe.base != AVERAGE:
        base = names.get(Path(recipe.base).resolve(), BASE_AVERAGE)
    found = [names.get(path.resolve()) for path in recipe.models]
    return Form(
        checkpoints=[name for name in found if name is not None],
        name=recipe.name,
        ranks=size_of(recipe),
        weights=_numbers(recipe.weights),
        base=base,
        dtype=recipe.dtype,
        lora_dtype=recipe.lora_dtype,
        device=recipe.device,
        iterations=recipe.iterations,
        tolerance=recipe.tolerance,
        seed=recipe.seed,
        vae=_words(VAE_CHOICES, recipe.vae),
        exact=_words(EXACT_CHOICES, recipe.exact),
        topup="" if recipe.topup is None else str(recipe.topup),
        allocation=_words(ALLOCATION_CHOICES, recipe.allocation),
        separate=recipe.multipliers == "separate",
        fit_weights=_numbers(recipe.fit_weights),
        layer_weights=_words(DIFFERENCE_CHOICES, recipe.layer_weights),
        save_styles=save_styles,
    )


def size_of(recipe: Recipe) -> str:
    """What a recipe asks for: a list of ranks, a size, or a share."""
    if recipe.target is not None:
        return f"{recipe.target * 100:.12g} %"
    if recipe.budget is not None:
        return f"{recipe.budget / 1e6:.12g} MB"
    return ", ".join(map(str, recipe.ranks))


def _size_key(text: str) -> str:
    """The setting that the text in the field of ranks is meant for."""
    if "%" in text:
        return "target"
    return "budget" if _SIZE.fullmatch(text.strip()) else "ranks"


def _words(choices: Mapping[str, str], value: str) -> str:
    return next(words for words, known in choices.items() if known == value)


def _numbers(values: Sequence[float] | None) -> str:
    return "" if values is None else ", ".join(f"{x:g}" for x in values)


def _whole(value: float | None) -> Any:
    """Browsers send whole numbers as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
