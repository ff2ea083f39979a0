"""Makes recipes and fit requests from bodies; only names of the host's list lead to files."""

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
"""The API's names of the recipe's settings, where they differ."""


def parse_recipe(body: PlanBody, name: str, host: Host) -> Recipe:
    """Returns the recipe of a body, by the host's list as it is now.

    Args:
        body: all settings except the name, which the body may leave out.
        name: of the hyper-model.
        host: whose list the names are looked up in.

    Raises:
        RecipeError: a setting is not allowed; the message begins with its name.
        CheckpointError: a name is not in the host's list.
    """
    if len(body.checkpoints) < 2:
        raise RecipeError(
            f"a merge takes two checkpoints or more, got {len(body.checkpoints)}",
            where="checkpoints",
            key="models",
        )
    listed = host.checkpoints()
    settings: dict[str, Any] = {
        field.name: getattr(body, field.name)
        for field in FIELDS
        if getattr(body, field.name, None) is not None
    }
    settings["name"] = name
    settings["models"] = tuple(find_file(name, "checkpoints", listed) for name in body.checkpoints)
    settings["base"] = AVERAGE if body.base is None else str(find_file(body.base, "base", listed))
    settings["output"] = host.folders().models.parent
    return Recipe.parse(settings, _place)


def check_merge(body: PlanBody, host: Host) -> Preflight:
    """Checks a merge against its files, and returns the result.

    Raises:
        HyperMergeError: it cannot be made like this.
    """
    name = suggest_name(body.checkpoints) if body.name is None else body.name
    return run_preflight(parse_recipe(body, name, host), host.folders())


def place_merge(body: PlanBody, host: Host) -> tuple[Preflight, Place]:
    """Checks a merge against its files and the folders; returns the result and where it goes.

    Raises:
        HyperMergeError: it cannot be made like this.
    """
    return with_free_name(check_merge(body, host), named=body.name is not None)


def parse_fit_request(body: FitBody, host: Host) -> FitRequest:
    """Returns the fit request of a body, by the host's list as it is now.

    Raises:
        RecipeError: a setting is not allowed; the message begins with its name.
        CheckpointError: the name is not in the host's list.
    """
    names = ("name", "topup", "device", "seed", "overwrite", "damaged")
    settings = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    path = find_file(body.checkpoint, "checkpoint", host.checkpoints())
    return FitRequest.parse({"run": body.run, "checkpoint": path, **settings}, _place)


def find_file(name: str, setting: str, listed: Mapping[str, Path]) -> Path:
    """Returns the file of a name; it is looked up in the host's list and nowhere else.

    Args:
        name: of a checkpoint, as a client sent it.
        setting: the setting that held it, for the message.
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
    """Returns the API's name of a recipe's setting."""
    return _NAMES.get(key, key)
