"""Recipes written as YAML, for the tests of what reads them."""

from pathlib import Path

import yaml

from hyper_merge.recipe.parsing import PrivateLoraTarget
from hyper_merge.recipe.recipe import FIELDS


def to_yaml(recipe):
    """Returns the text of a YAML file that `load_recipe` reads as an equal recipe."""
    names = [f.name for f in FIELDS if not (f.name == "ranks" and recipe.finds_ranks)]
    return "".join(setting_text(name, getattr(recipe, name)) for name in names)


def setting_text(key, value):
    """Returns the lines of a setting; paths stand one a line."""
    if not isinstance(value, tuple):
        return f"{key}: {scalar_text(value)}\n"
    items = [scalar_text(item) for item in value]
    if isinstance(value[0], Path):
        return f"{key}:" + "".join(f"\n  - {item}" for item in items) + "\n"
    return f"{key}: [{', '.join(items)}]\n"


def scalar_text(value):
    if isinstance(value, str | Path | PrivateLoraTarget):
        # always quoted: some names would read as numbers
        return yaml.safe_dump(str(value), default_style='"', width=float("inf")).strip()
    return "null" if value is None else str(value).lower()
