"""Recipes from YAML files and from the words of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from hyper_merge.recipe.fields import AVERAGE, FIELDS, SIZES
from hyper_merge.recipe.recipe import Recipe, unknown_setting
from hyper_merge.recipe.yaml_file import Setting, read_settings

Options: TypeAlias = "Mapping[str, str | Sequence[str]]"
"""Words after the options of the command line, by key."""


def load_recipe(
    path: Path, overrides: Options | None = None, defaults: Options | None = None
) -> Recipe:
    """Returns the recipe of a YAML file.

    Relative paths of checkpoints start at the current folder, as in the original project; where
    nothing is there, but beside the YAML file there is, that file is meant.

    Args:
        path: the YAML file.
        overrides: words from the command line; they win over the file.
        defaults: words for what neither has.

    Raises:
        RecipeError: the file cannot be read, or a setting is unknown, missing or impossible.
    """
    settings = read_settings(path)
    for key in ("models", "base"):
        if key in settings:
            value = _beside(settings[key].value, path.parent)
            settings[key] = Setting(value, settings[key].where)
    options = _option_settings(overrides or {})
    if options.keys() & SIZES:  # an option takes the place of any of these in the file
        settings = {key: setting for key, setting in settings.items() if key not in SIZES}
    return _recipe({**_option_settings(defaults or {}), **settings, **options}, str(path))


def recipe_from_options(options: Options, defaults: Options | None = None) -> Recipe:
    """Returns the recipe that the command line alone describes; `name` and `models` are needed.

    Args:
        options: words from the command line.
        defaults: words for what it lacks.

    Raises:
        RecipeError: a setting is unknown, missing or impossible.
    """
    return _recipe(_option_settings({**(defaults or {}), **options}), "command line")


def option_place(key: str) -> str:
    """Returns the place of a setting that stands on the command line."""
    return f"option --{key}"


def _recipe(settings: Mapping[str, Setting], source: str) -> Recipe:
    def where(key: str) -> str:
        return settings[key].where if key in settings else source

    return Recipe.parse({key: setting.value for key, setting in settings.items()}, where)


def _option_settings(options: Options) -> dict[str, Setting]:
    fields = {field.name: field for field in FIELDS}
    for key in options:
        if key not in fields:
            raise unknown_setting(key, option_place(key))
    return {
        key: Setting(fields[key].from_text(words), option_place(key))
        for key, words in options.items()
    }


def _beside(value: object, folder: Path) -> object:
    """Returns the value with each relative path that exists only under `folder` replaced by that."""
    if isinstance(value, list):
        return [_beside(item, folder) for item in value]
    if not isinstance(value, str) or value == AVERAGE or _exists(Path(value)):
        return value
    return str(folder / value) if _exists(folder / value) else value


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a zero byte: refused later, by its message
        return False
