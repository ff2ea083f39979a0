"""Makes requests from bodies, and answers from refusals; only names of the host's list lead to files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from fastapi import HTTPException

from hyper_merge.api.request_models import (
    AbsorbBody,
    AverageBody,
    CompareBody,
    ExportBody,
    ExtractBody,
    FitBody,
    PlanBody,
    PresetBody,
    RestoreBody,
    SafeBody,
)
from hyper_merge.errors import (
    CheckpointError,
    HyperMergeError,
    PictureError,
    RecipeError,
    UnknownRunError,
    settings_placed,
)
from hyper_merge.hosts.host import Host
from hyper_merge.hosts.job_queue import BusyError
from hyper_merge.operations.compare.request import CompareRequest, PictureSettings
from hyper_merge.operations.export import ExportRequest
from hyper_merge.operations.extend import ExtendRequest
from hyper_merge.operations.extract.extract import ExtractRequest
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.merge.naming import suggest_name, with_free_name
from hyper_merge.operations.merge.preflight import Preflight, run_preflight
from hyper_merge.operations.restore.request import RestoreRequest
from hyper_merge.recipe.parsing import parse_name, parse_share
from hyper_merge.recipe.plain_values import suggest_nearest
from hyper_merge.recipe.recipe import AVERAGE, FIELDS, Recipe
from hyper_merge.runs.folders import Place
from hyper_merge.runs.run import load_run
from hyper_merge.runs.weighted_loras import checkpoint_names, find_row

_NAMES: Final = {"models": "checkpoints"}
"""The API's names of the recipe's settings, where they differ."""
_LONGEST_PRESET: Final = 1_000_000


def parse_recipe(body: PlanBody | AverageBody, name: str, host: Host) -> Recipe:
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
    base = getattr(body, "base", None)  # an average has none
    settings["base"] = AVERAGE if base is None else str(find_file(base, "base", listed))
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


def parse_average(body: AverageBody, host: Host) -> Recipe:
    """Returns the recipe of an average, by the host's list as it is now."""
    return parse_recipe(body, body.name, host)


def parse_absorb(body: AbsorbBody, host: Host) -> ExtendRequest:
    """Returns the request for a run with further checkpoints."""
    listed = host.checkpoints()
    files = tuple(find_file(name, "checkpoints", listed) for name in body.checkpoints)
    values: dict[str, object] = {
        "run": body.run,
        "checkpoints": files,
        "name": body.name,
        "from_cache": body.from_cache,
    }
    return ExtendRequest.parse(values, str)


def parse_restore(body: RestoreBody, host: Host) -> RestoreRequest:
    """Returns the request for a restored checkpoint."""
    values: dict[str, object] = {
        "run": body.run,
        "shares": parse_shares(body.shares),
        "dtype": body.dtype,
        "overwrite": body.overwrite,
    }
    if body.name is not None:
        with settings_placed(str, "name"):
            values["to"] = host.folders().models / f"{parse_name(body.name)}.safetensors"
    return RestoreRequest.parse(values, lambda key: "shares" if key == "mix" else key)


def parse_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """Returns the shares of a mixture, all of them finite.

    Raises:
        RecipeError: one is not, or there is none.
    """
    numbers = {name: _float(share, "shares") for name, share in shares.items()}
    if not numbers or not all(map(math.isfinite, numbers.values())):
        raise RecipeError(
            "expected one checkpoint or more, with finite shares", where="shares", key="shares"
        )
    return numbers


def parse_export(body: ExportBody, _host: Host) -> ExportRequest:
    """Returns the request for one LoRA per checkpoint."""
    names = None if body.checkpoints is None else tuple(body.checkpoints)
    values = {"run": body.run, "checkpoints": names, "rank": body.rank, "overwrite": body.overwrite}
    return ExportRequest.parse(values, str)


def parse_extraction(body: ExtractBody, host: Host) -> ExtractRequest:
    """Returns the request for the LoRA from one checkpoint to another."""
    listed = host.checkpoints()
    names = ("rank", "name", "device", "seed", "overwrite", "damaged")
    settings = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    files = {name: find_file(getattr(body, name), name, listed) for name in ("base", "checkpoint")}
    return ExtractRequest.parse({**files, **settings}, str)


def parse_preset(body: PresetBody) -> dict[str, Any]:
    """Returns the settings of a preset.

    Raises:
        RecipeError: a number is not finite, a text is none, or they are longer than any form's.
    """
    for name, value in body.settings.items():
        if isinstance(value, int | float) and not math.isfinite(
            _float(value, f"settings.{name:.80}")
        ):
            raise RecipeError("expected a finite number", where=f"settings.{name:.80}")
    text = json.dumps(body.settings, ensure_ascii=False)
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise RecipeError("expected text, got half of a letter", where="settings")
    length = len(text)
    if length > _LONGEST_PRESET:
        raise RecipeError(
            f"expected at most {_LONGEST_PRESET:,} letters of JSON, got {length:,}",
            where="settings",
        )
    return dict(body.settings)


def parse_threshold(body: SafeBody, _host: Host) -> float:
    """Returns the share of an original's differences that a run must restore."""
    with settings_placed(str, "threshold"):
        return parse_share(body.threshold) or 1.0


def parse_comparison(body: CompareBody, host: Host) -> CompareRequest:
    """Returns the request for a comparison.

    Raises:
        PictureError: a setting is not allowed, or no picture can be made here.
    """
    generator = host.generator_info()
    if generator.problem:
        raise PictureError(generator.problem)
    run = load_run(host.folders(), body.run)
    sampler = generator.samplers[0] if body.sampler is None else body.sampler
    if sampler not in generator.samplers:
        raise PictureError(
            f"expected a sampler of the host, got {sampler!r:.80}",
            hint=suggest_nearest(sampler, generator.samplers),
            where="sampler",
        )
    settings = PictureSettings(
        prompts=tuple(body.prompts),
        negative=body.negative,
        sampler=sampler,
        steps=body.steps,
        cfg_scale=_float(body.cfg_scale, "cfg_scale"),
        width=body.width,
        height=body.height,
        seeds=tuple(body.seeds),
    )
    names = checkpoint_names(run) if body.checkpoints is None else body.checkpoints
    for name in names:
        find_row(run, name)
    return CompareRequest(body.run, tuple(names), settings, body.average, body.difference)


@contextmanager
def refusals() -> Iterator[None]:
    """Turns refusals into answers."""
    try:
        yield
    except HyperMergeError as error:
        raise HTTPException(_status(error), str(error)) from error


def _status(error: HyperMergeError) -> int:
    if isinstance(error, BusyError):
        return 409
    return 404 if isinstance(error, UnknownRunError) else 400


def _float(number: float, setting: str) -> float:
    """Returns a number of any size as a float.

    Raises:
        RecipeError: it is too large for one.
    """
    try:
        return float(number)
    except OverflowError:
        raise RecipeError("expected a number below 1e308", where=setting, key=setting) from None


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
