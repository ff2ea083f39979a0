"""The settings of a recipe as options, for the commands that take a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hyper_merge.cli.arguments import add_create_option, require_folder
from hyper_merge.errors import RecipeError
from hyper_merge.recipe.fields import FIELDS
from hyper_merge.recipe.loading import load_recipe, recipe_from_options
from hyper_merge.recipe.recipe import Recipe, option_help
from hyper_merge.runtime.progress import Progress

if TYPE_CHECKING:
    from hyper_merge.operations.merge.preflight import Preflight


AVERAGE_SETTINGS: Final = frozenset(
    {
        "name",
        "models",
        "device",
        "dtype",
        "weights",
        "block_weights",
        "output",
        "overwrite",
        "vae",
        "damaged",
    }
)
"""Names of the settings that have a say in the average; a recipe may have the others too."""

_ALL: Final = frozenset(field.name for field in FIELDS)


def add_recipe_arguments(parser: argparse.ArgumentParser, settings: Collection[str] = _ALL) -> None:
    """Adds the recipe file, an option for each setting, and one that makes the models folder.

    Args:
        parser: the command's.
        settings: names of the settings that the help lists; the others are taken as well.
    """
    parser.add_argument("recipe", nargs="?", type=Path, metavar="CONFIG.yaml", help="a recipe file")
    parser.add_argument("--config", type=Path, metavar="CONFIG.yaml", help="the same")
    group = parser.add_argument_group("settings (they win over the recipe file)")
    for field in FIELDS:
        text = option_help(field).replace("%", "%%")  # which argparse formats
        if field.name not in settings:
            text = argparse.SUPPRESS
        if field.takes == "flag":
            group.add_argument(field.option, action="store_const", const="true", help=text)
        else:
            nargs = "+" if field.takes == "many" else None
            group.add_argument(field.option, nargs=nargs, metavar=field.metavar, help=text)
    add_create_option(parser)


def preflight(
    options: argparse.Namespace, progress: Progress, defaults: Mapping[str, str] | None = None
) -> Preflight:
    """Returns the recipe of the options, validated against its files; warnings are shown.

    Args:
        options: the parsed command line.
        progress: shows the warnings.
        defaults: words for settings that neither the options nor the recipe file have.

    Raises:
        HyperMergeError: it cannot be merged.
        OutputError: the models folder does not exist, and is not to be made.
    """
    from hyper_merge.operations.merge.preflight import run_preflight

    validated = run_preflight(_recipe(options, defaults))
    if not options.create:
        require_folder(validated.recipe.output)
    for warning in validated.warnings:
        progress.warn(warning)
    return validated


def _recipe(options: argparse.Namespace, defaults: Mapping[str, str] | None) -> Recipe:
    values = {field.name: getattr(options, field.name) for field in FIELDS}
    overrides = {name: value for name, value in values.items() if value is not None}
    if options.recipe and options.config:
        raise RecipeError(f"two recipe files were given: {options.recipe} and {options.config}")
    path = options.recipe or options.config
    if path:
        return load_recipe(path, overrides, defaults)
    return recipe_from_options(overrides, defaults)
