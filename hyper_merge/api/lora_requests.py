"""Makes requests for LoRAs from bodies; only names of the host's lists lead to files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyper_merge.api.deserialize import find_file
from hyper_merge.api.lora_models import (
    ApplyLorasBody,
    CombineLorasBody,
    FitLoraBody,
    ResizeLoraBody,
    ShareLorasBody,
)
from hyper_merge.errors import RecipeError, settings_placed
from hyper_merge.hosts.host import Host
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.loras.request import ApplyRequest, CombineRequest
from hyper_merge.operations.loras.share import free_run_name, require_several, share_recipe
from hyper_merge.recipe.parsing import parse_name
from hyper_merge.recipe.recipe import FIELDS, Recipe


def parse_share(body: ShareLorasBody, host: Host) -> Recipe:
    """Returns the recipe of a body, by the host's list as it is now.

    Raises:
        RecipeError: a setting is not allowed; the message begins with its name.
        CheckpointError: a name is not in the host's list.
    """
    loras = _find_loras(body.loras, host)
    folders = host.folders()
    with settings_placed(_place, "models"):
        require_several(loras)
    values: dict[str, Any] = {
        field.name: getattr(body, field.name)
        for field in FIELDS
        if getattr(body, field.name, None) is not None
    }
    name = free_run_name(loras, folders) if body.name is None else body.name
    return share_recipe({**values, "name": name}, loras, folders, _place)


def parse_resize(body: ResizeLoraBody, host: Host) -> CombineRequest:
    """Returns the request for a smaller LoRA."""
    if (body.rank, body.size, body.keep) == (None, None, None):
        raise RecipeError("expected one of rank, size and keep, got none", where="rank", key="rank")
    (lora,) = _find_loras([body.lora], host, "lora")
    return _parse_combination(body, (lora,), {}, host)


def parse_combine(body: CombineLorasBody, host: Host) -> CombineRequest:
    """Returns the request for one LoRA of several."""
    return _parse_combination(body, _find_loras(body.loras, host), _weights(body), host)


def parse_add(body: ApplyLorasBody, host: Host) -> ApplyRequest:
    """Returns the request for a checkpoint with LoRAs."""
    return _parse_application(body, host, subtract=False)


def parse_subtract(body: ApplyLorasBody, host: Host) -> ApplyRequest:
    """Returns the request for a checkpoint without what LoRAs add."""
    return _parse_application(body, host, subtract=True)


def parse_lora_fit(body: FitLoraBody, host: Host) -> FitRequest:
    """Returns the request for the fit of a LoRA."""
    (lora,) = _find_loras([body.lora], host, "lora")
    names = ("run", "name", "topup", "overwrite")
    values = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    return FitRequest.parse({**values, "checkpoint": lora}, str)


def _parse_combination(
    body: ResizeLoraBody | CombineLorasBody,
    loras: tuple[Path, ...],
    weights: Mapping[str, Any],
    host: Host,
) -> CombineRequest:
    sizes = {name: getattr(body, name) for name in ("rank", "size", "keep", "dtype")}
    values = {
        **{name: value for name, value in sizes.items() if value is not None},
        "loras": loras,
        **weights,
        "to": _path(host.folders().loras, body.name),
        "overwrite": body.overwrite,
    }
    return CombineRequest.parse(values, str)


def _parse_application(body: ApplyLorasBody, host: Host, *, subtract: bool) -> ApplyRequest:
    values = {
        "checkpoint": find_file(body.checkpoint, "checkpoint", host.checkpoints()),
        "loras": _find_loras(body.loras, host),
        **_weights(body),
        "subtract": subtract,
        "to": _path(host.folders().models, body.name),
        "overwrite": body.overwrite,
    }
    return ApplyRequest.parse(values, str)


def _weights(body: CombineLorasBody | ApplyLorasBody) -> dict[str, Any]:
    return {"multipliers": body.multipliers, "block_weights": body.block_weights}


def _find_loras(names: Sequence[str], host: Host, setting: str = "loras") -> tuple[Path, ...]:
    listed = host.loras()
    return tuple(find_file(name, setting, listed) for name in names)


def _path(folder: Path, name: str | None) -> Path | None:
    """Returns the path of a new file; None for the suggested one."""
    if name is None:
        return None
    with settings_placed(str, "name"):
        return folder / f"{parse_name(name)}.safetensors"


def _place(key: str) -> str:
    """Returns the API's name of a recipe's setting."""
    return "loras" if key == "models" else key
