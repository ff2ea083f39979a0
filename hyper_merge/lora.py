"""Blocks as LoRA files in the profile that all hosts read, and what the files say of themselves.

A module of a file adds up @ down * alpha / rank to its weight. One alpha holds for the whole file,
for some loaders take it from one module; where a layer's rank is another, the factors make up for it.
Files of some families hold no alpha, and a module then adds up @ down.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from hyper_merge import __version__
from hyper_merge.checkpoints.architecture import Family
from hyper_merge.checkpoints.dtypes import FLOAT8
from hyper_merge.checkpoints.header import TensorInfo
from hyper_merge.checkpoints.layers import Layer
from hyper_merge.checkpoints.outputs import Outputs
from hyper_merge.checkpoints.writer import content_sha256
from hyper_merge.errors import NonFiniteError
from hyper_merge.preview import hyper_model_picture, lora_picture
from hyper_merge.prompts import tag

FORMAT_VERSION: Final = "1"
"""Of the `hyper_merge.*` metadata; readers refuse a higher one."""

CARD_SUFFIXES: Final = (".json", ".png")
"""Of the files beside a model that WebUIs make its card from: text and picture."""

COMPANIONS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "norms": ("norms", "AUTOMATIC1111, Forge and ComfyUI"),
        "all": ("norms and biases", "Forge and ComfyUI, not in AUTOMATIC1111"),
    }
)
"""What companions hold and where they load, by the recipe's word."""

ALONE: Final = "lora-alone"
"""`hyper_merge.kind` of a LoRA that brings a checkpoint back without any other; "lora" needs others."""

_LARGEST: Final = MappingProxyType(
    {
        torch.float16: 6e4,  # of 65504: hosts that scale a factor need room
        FLOAT8: torch.finfo(FLOAT8).max,  # torch 2.1 makes NaN of what is above
    }
)
_OWN: Final = "hyper_merge."

UP, DOWN, ALPHA = ".lora_up.weight", ".lora_down.weight", ".alpha"
"""Ends of a module's keys."""

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Module to up (m, r) and down (r, n); a module with rank 0 may be missing."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that went into a merge."""

    name: str  # of its file
    sha256: str  # of the whole file, 64 hex digits
    legacy_hash: str  # A1111's 8 digits
    metadata: Mapping[str, str]  # as the file has it: its own lineage is carried on


@dataclass(frozen=True)
class Lineage:
    """What all files of one merge have in common."""

    name: str  # file stem of the hyper-model
    family: Family
    recipe: Mapping[str, str]  # as `Recipe.to_metadata` gives it
    sources: tuple[Source, ...]
    date: str  # ISO 8601


@dataclass(frozen=True)
class LoraFile:
    """One block's file, apart from its tensors."""

    lineage: Lineage
    run: str  # the first part of its name
    index: int  # place in the rank list, from 0
    count: int  # of the run's LoRAs
    rank: int  # as asked for; small layers may have less
    multipliers: Mapping[str, float]  # by the checkpoint's file stem
    explained: float | None  # fraction 0..1 of the deviations, by all blocks together, if known
    dtype: torch.dtype = torch.float16  # of the stored factors
    alone: str | None = None  # the checkpoint that it brings back without any other
    tops_up: str | None = None  # the checkpoint that it is added to the shared LoRAs for
    text_multipliers: Mapping[str, float] | None = None  # the text encoder's, if it has its own
    own_alpha: float | None = None  # where the file's alpha is not its rank

    @property
    def alpha(self) -> float:
        """Of all modules; files of some families leave it out."""
        return float(self.rank) if self.own_alpha is None else self.own_alpha

    def tag(self, stem: str, checkpoint: str) -> str:
        """What adds a LoRA of this stem for a checkpoint."""
        own = self.text_multipliers
        return tag(stem, self.multipliers[checkpoint], own[checkpoint] if own else None)


def lora_tensors(
    layers: Sequence[Layer],
    rank_of: Sequence[int],  # a rank per layer
    dtype: torch.dtype,
    alpha: float | None,
) -> dict[str, TensorInfo]:
    """The table of contents of a file with factors of this type; a layer of rank 0 is left out.

    But not where others that must go with it are there: it then has rank 1, to be filled with zeros.
    """
    tensors = {}
    for layer, rank in zip(layers, whole_groups(layers, rank_of), strict=True):
        if rank:
            tensors[layer.module + DOWN] = TensorInfo(dtype, layer.down_shape(rank))
            tensors[layer.module + UP] = TensorInfo(dtype, layer.up_shape(rank))
            if alpha is not None:
                tensors[layer.module + ALPHA] = TensorInfo(_alpha_dtype(alpha, dtype), ())
    return tensors


def whole_groups(layers: Sequence[Layer], rank_of: Sequence[int]) -> list[int]:
    """The ranks, with 1 for a layer of rank 0 if another that must go with it has more.

    A1111 changes an attention with one tensor for query, key and value only if the file has them
    all, and the output.
    """
    pairs = list(zip(layers, rank_of, strict=True))
    present = {layer.together for layer, rank in pairs if rank and layer.together}
    return [max(rank, 1) if layer.together in present else rank for layer, rank in pairs]


def lora_bytes(
    layers: Sequence[Layer],
    ranks: Sequence[tuple[int, ...]],  # per layer, a rank for each file
    dtype: torch.dtype,
    alphas: Sequence[float | None],  # of the files
) -> int:
    """Size of all files of a run, less their headers."""
    tables = (
        lora_tensors(layers, of_layers, dtype, alpha)
        for alpha, of_layers in zip(alphas, zip(*ranks, strict=True), strict=True)
    )
    return sum(info.nbytes for table in tables for info in table.values())


def as_lora_weights(
    layer: Layer,
    up: Tensor,  # (m, r)
    down: Tensor,  # (r, n)
    alpha: float | None,
    dtype: torch.dtype = torch.float16,
) -> dict[str, Tensor]:
    """One layer's tensors as they are stored: up @ down is what hosts will add, up to rounding.

    Args:
        layer: whose weight it is for.
        up: left factor; `r` is at least 1.
        down: right factor.
        alpha: of the file; r / alpha goes into the factors, half of it (as a root) into each. None
            for a file without alphas.
        dtype: of the stored factors.

    Raises:
        NonFiniteError: NaN, infinity, or more than a file of the type can safely hold.
    """
    return _named(layer, stored_factors(layer, up, down, alpha, dtype), alpha)


def stored_factors(
    layer: Layer,
    up: Tensor,  # (m, r)
    down: Tensor,  # (r, n)
    alpha: float | None,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:  # (m, r), (r, n)
    """The factors scaled and rounded as a file holds them; as for `as_lora_weights`."""
    root = _root(up.shape[1], alpha)
    return _stored(layer, up * root, dtype), _stored(layer, down * root, dtype)


def as_hosts_add(
    up: Tensor,  # (m, r), as a file holds it
    down: Tensor,  # (r, n)
    alpha: float | None,
) -> tuple[Tensor, Tensor]:  # (m, r), (r, n), float32
    """Factors whose product is what a host adds in exact arithmetic.

    Multipliers that are fitted to these are right for the file.
    """
    root = _root(up.shape[1], alpha)
    return up.float() / root, down.float() / root


def write_lora(
    outputs: Outputs,
    path: Path,
    layers: Sequence[Layer],
    factors: Factors,
    file: LoraFile,
    tick: Callable[[int], None] = lambda _count: None,
) -> None:
    """Stages one LoRA file with its metadata, and beside it text and picture of its card in WebUIs.

    Args:
        outputs: the merge's files; they appear together.
        path: of the file; hosts call the LoRA by its stem.
        layers: of the checkpoints.
        factors: of the block, as `stored_factors` gives them for the file's alpha and type.
        file: everything else.
        tick: told the bytes of every tensor when it is hashed and when it is written; may raise,
            to stop.

    Raises:
        OutputError: the place is taken.
    """
    ranks = whole_groups(layers, [_rank(layer, factors) for layer in layers])
    alpha = file.alpha if file.lineage.family.lora_alpha else None
    stored: dict[str, Tensor] = {}
    for layer, rank in zip(layers, ranks, strict=True):
        tick(0)
        if rank:
            pair = factors[layer.module] if _rank(layer, factors) else _zeros(layer, file.dtype)
            stored |= _named(layer, pair, alpha)
    declared = lora_tensors(layers, ranks, file.dtype, alpha)
    model_hash = content_sha256(stored, declared, tick)
    metadata = lora_metadata(file, path.stem, model_hash, uniform=set(ranks) <= {0, file.rank})
    with outputs.safetensors(path, declared, metadata) as writer:
        for key, tensor in stored.items():
            writer.write(key, tensor)
            tick(declared[key].nbytes)
    picture = lora_picture(file.run, file.index, file.count, file.rank, file.multipliers)
    outputs.text(path.with_suffix(CARD_SUFFIXES[0]), card(file, path.stem))
    outputs.bytes(path.with_suffix(CARD_SUFFIXES[1]), picture)


def lora_metadata(
    file: LoraFile, stem: str, model_hash: str, *, uniform: bool = True
) -> dict[str, str]:
    """What a LoRA file says of itself.

    Args:
        file: the block's.
        stem: of the file; hosts take the LoRA's alias from here.
        model_hash: SHA-256 of the tensors' bytes in the file's order (`content_sha256`).
        uniform: whether every layer has the block's rank.
    """
    lineage = file.lineage
    dim, alpha = str(file.rank) if uniform else "Dynamic", str(file.alpha)
    return {
        "ss_base_model_version": lineage.family.ss_base_model_version,
        "ss_v2": lineage.family.ss_v2,
        "ss_network_module": "networks.lora",
        "ss_network_dim": dim,
        "ss_network_alpha": alpha,
        "ss_network_args": _json({"conv_dim": dim, "conv_alpha": alpha}),
        "ss_output_name": stem,
        "ss_sd_model_name": f"{lineage.name}.safetensors",
        "sshs_model_hash": model_hash,
        **_modelspec(lineage, stem, "/lora"),
        **_own(lineage, "lora" if file.alone is None else ALONE),
        _OWN + "index": str(file.index),
        _OWN + "rank": str(file.rank),
        _OWN + "multipliers": _json(dict(file.multipliers)),
        **_text_multipliers(file),
        **_known(file),
    }


def checkpoint_metadata(lineage: Lineage, kind: str = "hyper-model") -> dict[str, str]:
    """What a written checkpoint says of itself: A1111's lineage keys with those of its sources, and ours."""
    ancestors: dict[str, Any] = {}
    for source in lineage.sources:
        ancestors |= _decoded(source.metadata.get("sd_merge_models")) or {}
    parents = {
        source.sha256: {
            "name": source.name,
            "legacy_hash": source.legacy_hash,
            "sd_merge_recipe": _decoded(source.metadata.get("sd_merge_recipe")),
        }
        for source in lineage.sources
    }
    return {
        "sd_merge_recipe": _json({**lineage.recipe, "type": "hyper-merge"}),
        "sd_merge_models": _json({**ancestors, **parents}),
        **_modelspec(lineage, lineage.name, ""),
        **_own(lineage, kind),
    }


def card(file: LoraFile, stem: str) -> str:
    """The JSON text of the sidecar `<stem>.json`, from which WebUIs fill the LoRA's card."""
    lines = [f"{checkpoint}: {file.tag(stem, checkpoint)}" for checkpoint in file.multipliers]
    return _card(
        {
            "description": _description(file),
            "sd version": file.lineage.family.sd_version,
            "activation text": "",
            "preferred weight": 1.0,  # the largest multiplier of every LoRA
            "negative text": "",
            "notes": "\n".join(lines),
        }
    )


def companion_card(file: LoraFile, stem: str, exact: str) -> str:
    """The JSON text of a companion's sidecar; `exact` is the recipe's word for what it holds."""
    what, where = COMPANIONS[exact]
    lines = [f"{checkpoint}: {tag(stem, x)}" for checkpoint, x in file.multipliers.items()]
    return _card(
        {
            "description": f"{what.capitalize()} that go with LoRA {file.index + 1} of {file.count}"
            f" of {file.run}: to be used with the same multiplier. Loads in {where}.",
            "sd version": file.lineage.family.sd_version,
            "activation text": "",
            "preferred weight": 1.0,
            "negative text": "",
            "notes": "\n".join(lines),
        }
    )


def stage_checkpoint_card(
    outputs: Outputs, path: Path, lineage: Lineage, *, overwrite: bool
) -> None:
    """Stages text and picture of the hyper-model's card in WebUIs.

    Args:
        outputs: the merge's files.
        path: of the hyper-model.
        lineage: of the merge.
        overwrite: whether to replace a text or picture that is there; else it stays, for it may be
            the user's own.
    """
    stems = [Path(source.name).stem for source in lineage.sources]
    description = f"Average of {len(stems)} checkpoints, which LoRAs of the same merge bring back."
    text = _card({"description": description, "notes": "\n".join(stems)})
    contents = (text.encode(), hyper_model_picture(path.stem, stems))
    for suffix, content in zip(CARD_SUFFIXES, contents, strict=True):
        place = path.with_suffix(suffix)
        if overwrite or not place.exists():
            outputs.bytes(place, content)


def _description(file: LoraFile) -> str:
    name = file.lineage.name
    if file.alone is not None:
        return f"Turns {name} into {file.alone}, by itself; rank {file.rank}."
    if file.tops_up is not None:
        return (
            f"Private LoRA of {file.tops_up}, rank {file.rank}: what the shared LoRAs of {file.run}"
            " leave of it. To be used with all of those."
        )
    others = "" if file.count == 1 else " and its other LoRAs"
    return (  # cards show three lines
        f"LoRA {file.index + 1} of {file.count} of {file.run}, rank {file.rank}."
        f" Goes with {name}{others}; multipliers in the notes."
    )


def _known(file: LoraFile) -> dict[str, str]:
    """What not every LoRA file can say of itself."""
    known = {} if file.explained is None else {_OWN + "explained": repr(float(file.explained))}
    one = file.alone or file.tops_up
    if one is not None:
        known |= {_OWN + "run": file.run, _OWN + "checkpoint": one}
    return known


def _text_multipliers(file: LoraFile) -> dict[str, str]:
    own = file.text_multipliers
    return {} if own is None else {_OWN + "text_multipliers": _json(dict(own))}


def _rank(layer: Layer, factors: Factors) -> int:
    return factors[layer.module][0].shape[1] if layer.module in factors else 0


def _named(layer: Layer, stored: tuple[Tensor, Tensor], alpha: float | None) -> dict[str, Tensor]:
    up, down = stored
    rank = up.shape[1]
    tensors = {
        layer.module + DOWN: down.reshape(layer.down_shape(rank)),
        layer.module + UP: up.reshape(layer.up_shape(rank)),
    }
    if alpha is not None:
        value = torch.tensor(alpha, dtype=_alpha_dtype(alpha, up.dtype))
        tensors[layer.module + ALPHA] = value
    return tensors


def _zeros(layer: Layer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # (m, 1), (1, n)
    return torch.zeros(layer.m, 1, dtype=dtype), torch.zeros(1, layer.n, dtype=dtype)


def _root(rank: int, alpha: float | None) -> float:
    return 1.0 if alpha is None or rank == 0 else math.sqrt(rank / alpha)


def _alpha_dtype(alpha: float, dtype: torch.dtype) -> torch.dtype:
    """Kohya stores alpha like the factors; bfloat16 cannot hold every whole number above 256.

    In 8 bits nobody can calculate with it.
    """
    exact = dtype != FLOAT8 and float(torch.tensor(alpha, dtype=dtype)) == alpha
    return dtype if exact else torch.float32


def _stored(layer: Layer, factor: Tensor, dtype: torch.dtype) -> Tensor:
    peak = float(factor.abs().amax()) if factor.numel() else 0.0
    if not math.isfinite(peak):
        raise NonFiniteError(f"{layer.module}: a factor holds {peak}, nothing was written")
    if peak > _LARGEST.get(dtype, math.inf):
        raise NonFiniteError(
            f"{layer.module}: a factor reaches {peak:.4g}, {str(dtype).removeprefix('torch.')} files hold at most"
            f" {_LARGEST[dtype]:.0f}; choose lora_dtype bfloat16 or float32"
        )
    return factor.detach().to(device="cpu", dtype=dtype)


def _modelspec(lineage: Lineage, title: str, suffix: str) -> dict[str, str]:
    family = lineage.family
    predicts = family.modelspec_prediction_type
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": family.modelspec_architecture + suffix,
        "modelspec.implementation": family.modelspec_implementation,
        "modelspec.title": title,
        "modelspec.resolution": family.modelspec_resolution,
        "modelspec.date": lineage.date,
        "modelspec.merged_from": ", ".join(source.name for source in lineage.sources),
        **({"modelspec.prediction_type": predicts} if predicts else {}),
    }


def _own(lineage: Lineage, kind: str) -> dict[str, str]:
    sources = [
        {"name": source.name, "sha256": source.sha256, "legacy_hash": source.legacy_hash}
        for source in lineage.sources
    ]
    return {
        _OWN + "format_version": FORMAT_VERSION,
        _OWN + "version": __version__,
        _OWN + "kind": kind,
        _OWN + "name": lineage.name,
        _OWN + "recipe": _json(dict(lineage.recipe)),
        _OWN + "lineage": _json(sources),
    }


def _card(content: Mapping[str, object]) -> str:
    return json.dumps(content, indent=4, ensure_ascii=False) + "\n"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _decoded(text: str | None) -> dict[str, Any] | None:
    """A JSON object of a foreign file's metadata; None for anything else, which is not ours to judge."""
    try:
        value = json.loads(text or "null")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
