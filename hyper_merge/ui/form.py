"""The form's values, as a browser sends them, and the recipe that they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hyper_merge.errors import CheckpointError, RecipeError
from hyper_merge.folders import Folders
from hyper_merge.recipe import AVERAGE, FIELDS, Recipe, SettingError

BASE_AVERAGE: Final = "the average of the checkpoints"
VAE_CHOICES: Final = {"of the first checkpoint": "first", "average of all": "average"}
EXACT_CHOICES: Final = {
    "no": "none",
    "norms (A1111, Forge, ComfyUI)": "norms",
    "norms and biases (Forge, ComfyUI)": "all",
}
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
    "device": "Device",
    "iterations": "Iterations",
    "tolerance": "Tolerance",
    "seed": "Seed",
    "vae": "VAE",
    "exact": "Companion LoRAs",
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
    device: str
    iterations: float | None
    tolerance: float | None
    seed: float | None
    vae: str
    exact: str
    save_styles: bool


def chosen(form: Form, listed: Mapping[str, Path]) -> tuple[Path, ...]:
    """Files of the chosen checkpoints; only names of the host's list are ever looked up.

    Raises:
        CheckpointError: a name is not in the list (any more).
    """
    return tuple(_file(name, listed) for name in form.checkpoints or [])


def recipe_of(form: Form, listed: Mapping[str, Path], folders: Folders) -> Recipe:
    """The recipe that the form asks for.

    Raises:
        RecipeError: a field cannot be; the message begins with its label.
        CheckpointError: a name is not in the host's list.
    """
    texts = {"ranks": form.ranks, "weights": form.weights}
    words: dict[str, Any] = {
        field.name: field.from_text(texts[field.name] or "")
        for field in FIELDS
        if field.name in texts
    }
    models = chosen(form, listed)
    try:
        return Recipe(
            **words,
            name=form.name,
            models=models,
            base=AVERAGE if form.base == BASE_AVERAGE else str(_file(form.base, listed)),
            dtype=form.dtype,  # type: ignore[arg-type]
            device=form.device,
            iterations=_whole(form.iterations),
            tolerance=form.tolerance,  # type: ignore[arg-type]
            seed=_whole(form.seed),
            vae=VAE_CHOICES.get(form.vae, form.vae),  # type: ignore[arg-type]
            exact=EXACT_CHOICES.get(form.exact, form.exact),  # type: ignore[arg-type]
            output=folders.models.parent,
        )
    except SettingError as error:
        raise RecipeError(f"{LABELS.get(error.key, error.key)}: {error.problem}") from None


def form_of(recipe: Recipe, listed: Mapping[str, Path], *, save_styles: bool) -> Form:
    """The form that asks for a recipe; checkpoints that are no longer listed are left out."""
    names = {path.resolve(): name for name, path in listed.items()}
    vae = next(words for words, value in VAE_CHOICES.items() if value == recipe.vae)
    exact = next(words for words, value in EXACT_CHOICES.items() if value == recipe.exact)
    base = BASE_AVERAGE
    if recipe.base != AVERAGE:
        base = names.get(Path(recipe.base).resolve(), BASE_AVERAGE)
    found = [names.get(path.resolve()) for path in recipe.models]
    return Form(
        checkpoints=[name for name in found if name is not None],
        name=recipe.name,
        ranks=", ".join(map(str, recipe.ranks)),
        weights="" if recipe.weights is None else ", ".join(f"{x:g}" for x in recipe.weights),
        base=base,
        dtype=recipe.dtype,
        device=recipe.device,
        iterations=recipe.iterations,
        tolerance=recipe.tolerance,
        seed=recipe.seed,
        vae=vae,
        exact=exact,
        save_styles=save_styles,
    )


def _file(name: str, listed: Mapping[str, Path]) -> Path:
    if name not in listed:
        raise CheckpointError(f"{name} is no longer in the list; press Refresh and pick again")
    if not listed[name].exists():
        raise CheckpointError(f"{name} is no longer there; press Refresh and pick again")
    return listed[name]


def _whole(value: float | None) -> Any:
    """Browsers send whole numbers as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
