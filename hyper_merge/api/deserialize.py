"""From requests to recipes and orders; only names of the host's list lead to files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from hyper_merge.api.request_models import FitBody, PlanBody
from hyper_merge.errors import CheckpointError, RecipeError
from hyper_merge.hosts.host import Host
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.merge.naming import suggest_name, with_free_name
from hyper_merge.operations.merge.preflight import Preflight, run_preflight
from hyper_merge.recipe.plain_values import suggest_nearest
from hyper_merge.recipe.recipe import AVERAGE, FIELDS, Recipe
from hyper_merge.runs.folders import Place

_NAMES: Final = {"models": "checkpoints"}
"""What the API calls a recipe's setting, where that is another word."""


def recipe_of(asked: PlanBody, name: str, host: Host) -> Recipe:
    """The recipe that a client asks for, by the host's list as it is now.

    Args:
        asked: all but the name, which may be left out there.
        name: of the hyper-model.
        host: whose list is meant.

    Raises:
        RecipeError: a setting cannot be; the message begins with its name.
        CheckpointError: a name is not in the host's list.
    """
    if len(asked.checkpoints) < 2:
        raise RecipeError(
            f"a merge takes two checkpoints or more, got {len(asked.checkpoints)}",
            where="checkpoints",
            key="models",
        )
    listed = host.checkpoints()
    given: dict[str, Any] = {
        field.name: getattr(asked, field.name)
        for field in FIELDS
        if getattr(asked, field.name, None) is not None
    }
    given["name"] = name
    given["models"] = tuple(file_of(name, "checkpoints", listed) for name in asked.checkpoints)
    given["base"] = AVERAGE if asked.base is None else str(file_of(asked.base, "base", listed))
    given["output"] = host.folders().models.parent
    return Recipe.parse(given, _place)


def examined(asked: PlanBody, host: Host) -> Preflight:
    """A merge held against the files alone.

    Raises:
        HyperMergeError: it cannot be made like this.
    """
    name = suggest_name(asked.checkpoints) if asked.name is None else asked.name
    return run_preflight(recipe_of(asked, name, host), host.folders())


def prepared(asked: PlanBody, host: Host) -> tuple[Preflight, Place]:
    """A merge held against the files and the folders.

    Raises:
        HyperMergeError: it cannot be made like this.
    """
    return with_free_name(examined(asked, host), named=asked.name is not None)


def order_of(asked: FitBody, host: Host) -> FitRequest:
    """The fit that a client asks for, by the host's list as it is now.

    Raises:
        RecipeError: a setting cannot be; the message begins with its name.
        CheckpointError: the name is not in the host's list.
    """
    names = ("name", "topup", "device", "seed", "overwrite")
    given = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    path = file_of(asked.checkpoint, "checkpoint", host.checkpoints())
    return FitRequest.parse({"run": asked.run, "checkpoint": path, **given}, _place)


def file_of(name: str, setting: str, listed: Mapping[str, Path]) -> Path:
    """The file of a name; nothing but the host's list is ever looked up.

    Args:
        name: by which a client names it.
        setting: where it stood, for the message.
        listed: the host's list.

    Raises:
        CheckpointError: it is not in the list, or its file is gone.
    """
    if name not in listed:
        raise CheckpointError(
            f"expected a name of the host's list, got {name!r:.200}",
            hint=suggest_nearest(name, listed) or "refresh the list if it is new",
            where=setting,
        )
    if not listed[name].exists():
        raise CheckpointError(
            f"the file of {name} is no longer there", where=setting, file=listed[name]
        )
    return listed[name]


def _place(key: str) -> str:
    """Returns what the API calls a recipe's setting."""
    return _NAMES.get(key, key)
