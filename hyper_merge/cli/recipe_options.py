"""The settings of a recipe as options, for the commands that take a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hyper_merge.errors import RecipeError
from hyper_merge.recipe.fields import FIELDS
from hyper_merge.recipe.loading import load_recipe, recipe_from_options
from hyper_merge.recipe.recipe import Recipe, option_help
from hyper_merge.runtime.progress import Progress

if TYPE_CHECKING:
    from hyper_merge.operations.merge.preflight import Preflight


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the recipe file and an option for each setting."""
    parser.add_argument("recipe", nargs="?", type=Path, metavar="CONFIG.yaml", help="a recipe file")
    parser.add_argument("--config", type=Path, metavar="CONFIG.yaml", help="the same")
    group = parser.add_argument_group("settings (they win over the recipe file)")
    for field in FIELDS:
        text = option_help(field).replace("%", "%%")  # which argparse formats
        if field.takes == "flag":
            group.add_argument(field.option, action="store_const", const="true", help=text)
        else:
            nargs = "+" if field.takes == "many" else None
            group.add_argument(field.option, nargs=nargs, metavar=field.metavar, help=text)


def preflight(options: argparse.Namespace, progress: Progress) -> Preflight:
    """Returns the recipe of the options, validated against its files; warnings are shown.

    Raises:
        HyperMergeError: it cannot be merged.
    """
    from hyper_merge.operations.merge.preflight import run_preflight

    validated = run_preflight(_recipe(options))
    for warning in validated.warnings:
        progress.warn(warning)
    return validated


def _recipe(options: argparse.Namespace) -> Recipe:
    values = {field.name: getattr(options, field.name) for field in FIELDS}
    overrides = {name: value for name, value in values.items() if value is not None}
    if options.recipe and options.config:
        raise RecipeError(f"two recipe files were given: {options.recipe} and {options.config}")
    path = options.recipe or options.config
    return load_recipe(path, overrides) if path else recipe_from_options(overrides)
