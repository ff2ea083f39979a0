"""Writes blocks as LoRA files in the profile that all hosts read.

A module of a file adds up @ down * alpha / rank to its weight. One alpha holds for the whole file,
since some loaders take it from one module; where a layer's rank differs, the factors make up for it.
Files of some families hold no alpha, and a module then adds up @ down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.io.dtypes import FLOAT8, widened
from hyper_merge.checkpoints.io.header import TensorInfo
from hyper_merge.checkpoints.io.safetensors_writer import content_sha256
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.errors import NonFiniteError
from hyper_merge.loras.card_images import lora_picture
from hyper_merge.loras.cards import CARD_SUFFIXES, format_card
from hyper_merge.loras.metadata import LoraFile, lora_metadata

_LARGEST: Final = MappingProxyType(
    {
        torch.float16: 6e4,  # of 65504: hosts that scale a factor need room
        FLOAT8: torch.finfo(FLOAT8).max,  # torch 2.1 turns larger values into NaN
    }
)
ALPHA: Final = ".alpha"
"""The end of the key of a module's alpha."""

WHOLE: Final = ".diff"
"""The end of the key of a module that is one whole tensor."""

WHOLE_DTYPE: Final = torch.float32  # A1111 rounds the weight itself to the type of its change

FactorsByModule = Mapping[str, tuple[Tensor, Tensor]]
"""Module to up (m, r) and down (r, n); a module with rank 0 may be missing."""


@dataclass(frozen=True)
class StoredFormat:
    """How a LoRA file holds its factors."""

    alpha: float | None  # of the file; None for one without
    dtype: torch.dtype


def lora_tensors(
    layers: Sequence[Layer],
    rank_of: Sequence[int],  # a rank per layer
    dtype: torch.dtype,
    alpha: float | None,
) -> dict[str, TensorInfo]:
    """Returns the table of contents of a file with factors of this type.

    A layer of rank 0 is left out, unless others that must go with it are there: it then has rank 1,
    to be filled with zeros.
    """
    tensors = {}
    for layer, rank in zip(layers, complete_groups(layers, rank_of), strict=True):
        if rank and layer.whole:
            tensors[layer.module + WHOLE] = TensorInfo(WHOLE_DTYPE, layer.shape)
        elif rank:
            tensors[layer.down_key] = TensorInfo(dtype, layer.down_shape(rank))
            tensors[layer.up_key] = TensorInfo(dtype, layer.up_shape(rank))
            if alpha is not None:
                tensors[layer.module + ALPHA] = TensorInfo(_alpha_dtype(alpha, dtype), ())
    return tensors


def complete_groups(layers: Sequence[Layer], rank_of: Sequence[int]) -> list[int]:
    """Returns the ranks, with 1 for a layer of rank 0 if another that must go with it has more.

    A1111 changes an attention with one tensor for query, key and value only if the file has them
    all, and the output.
    """
    pairs = list(zip(layers, rank_of, strict=True))
    present = {layer.bundle for layer, rank in pairs if rank and layer.bundle}
    return [max(rank, 1) if layer.bundle in present else rank for layer, rank in pairs]


def lora_bytes(
    layers: Sequence[Layer],
    ranks: Sequence[tuple[int, ...]],  # per layer, a rank for each file
    dtype: torch.dtype,
    alphas: Sequence[float | None],  # of the files
) -> int:
    """Returns the bytes of all files of a run, without their headers."""
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
    """Returns one layer's tensors by key, as stored: hosts will add up @ down, up to rounding.

    Arguments and errors are those of `stored_factors`.
    """
    return named_tensors(layer, stored_factors(layer, up, down, alpha, dtype), alpha)


def stored_factors(
    layer: Layer,
    up: Tensor,  # (m, r)
    down: Tensor,  # (r, n)
    alpha: float | None,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:  # (m, r), (r, n)
    """Returns the factors scaled and rounded as a file holds them.

    Args:
        layer: the layer that they are for.
        up: left factor; `r` is at least 1.
        down: right factor.
        alpha: of the file; r / alpha goes into the factors, half of it (as a root) into each. None
            for a file without alphas.
        dtype: of the stored factors; those of whole layers, which no file holds, stay float32.

    Raises:
        NonFiniteError: NaN, infinity, or more than a file of the type can safely hold.
    """
    root = stored_root(up.shape[1], alpha)
    return stored_values(layer, up * root, dtype), stored_values(layer, down * root, dtype)


def stored_values(layer: Layer, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns factors rounded to the type of a file, or that in which files hold whole layers.

    Raises:
        NonFiniteError: NaN, infinity, or more than a file of the type can safely hold.
    """
    dtype = WHOLE_DTYPE if layer.whole else dtype
    peak = float(factor.abs().amax()) if factor.numel() else 0.0
    if not math.isfinite(peak):
        raise NonFiniteError(f"{layer.module}: a factor holds {peak}, nothing was written")
    if peak > _LARGEST.get(dtype, math.inf):
        raise NonFiniteError(
            f"{layer.module}: a factor reaches {peak:.4g}, {str(dtype).removeprefix('torch.')}"
            f" files hold at most {_LARGEST[dtype]:.0f}",
            hint="choose lora_dtype bfloat16 or float32",
        )
    return factor.detach().to(device="cpu", dtype=dtype)


def as_hosts_apply(
    up: Tensor,  # (m, r), as a file holds it
    down: Tensor,  # (r, n)
    alpha: float | None,
) -> tuple[Tensor, Tensor]:  # (m, r), (r, n), float32
    """Returns factors whose product is what a host adds in exact arithmetic.

    Multipliers that are fitted to these are right for the file.
    """
    root = stored_root(up.shape[1], alpha)
    return widened(up) / root, widened(down) / root


def stored_root(rank: int, alpha: float | None) -> float:
    """Returns what each of a file's factors has been multiplied with."""
    return 1.0 if alpha is None or rank == 0 else math.sqrt(rank / alpha)


def product_scale(rank: int, alpha: float | None) -> float:
    """Returns what hosts multiply the product of a file's factors with."""
    return stored_root(rank, alpha) ** -2


def write_lora(
    outputs: FileTransaction,
    path: Path,
    layers: Sequence[Layer],
    factors: FactorsByModule,
    file: LoraFile,
    tick: Callable[[int], None] = lambda _count: None,
) -> None:
    """Stages one LoRA file with its metadata, and text and picture of its card in WebUIs.

    Args:
        outputs: the merge's files; they appear together.
        path: of the file; hosts call the LoRA by its stem.
        layers: of the checkpoints.
        factors: of the block, as `stored_factors` gives them for the file's alpha and type.
        file: everything else.
        tick: called with the bytes of every tensor, once for its hash and once when it is written;
            may raise, to stop.

    Raises:
        OutputError: the place is taken.
    """
    stage_factors(outputs, path, layers, factors, file, tick)
    picture = lora_picture(file.run, file.index, file.count, file.rank, file.multipliers)
    outputs.text(path.with_suffix(CARD_SUFFIXES[0]), format_card(file, path.stem))
    outputs.bytes(path.with_suffix(CARD_SUFFIXES[1]), picture)


def stage_factors(
    outputs: FileTransaction,
    path: Path,
    layers: Sequence[Layer],
    factors: FactorsByModule,
    file: LoraFile,
    tick: Callable[[int], None] = lambda _count: None,
    further: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Stages one LoRA file as `write_lora` does, without a card.

    Args:
        outputs: the files that appear together.
        path: of the file.
        layers: of the network.
        factors: as for `write_lora`.
        file: everything else.
        tick: as for `write_lora`.
        further: metadata in addition.

    Raises:
        OutputError: the place is taken.
    """
    ranks = complete_groups(layers, [_rank(layer, factors) for layer in layers])
    alpha = file.alpha if file.lineage.family.lora_alpha else None
    stored: dict[str, Tensor] = {}
    for layer, rank in zip(layers, ranks, strict=True):
        tick(0)
        if rank:
            pair = factors[layer.module] if _rank(layer, factors) else _zeros(layer, file.dtype)
            stored |= named_tensors(layer, pair, alpha)
    declared = lora_tensors(layers, ranks, file.dtype, alpha)
    model_hash = content_sha256(stored, declared, tick)
    metadata = lora_metadata(file, path.stem, model_hash, uniform=set(ranks) <= {0, file.rank})
    with outputs.safetensors(path, declared, {**further, **metadata}) as writer:
        for key, tensor in stored.items():
            writer.write(key, tensor)
            tick(declared[key].nbytes)


def named_tensors(
    layer: Layer,
    stored: tuple[Tensor, Tensor],  # (m, r), (r, n), as `stored_factors` gives them
    alpha: float | None,
) -> dict[str, Tensor]:
    """Returns one layer's tensors by key: factors with their alpha, or one whole tensor."""
    up, down = stored
    if layer.whole:
        left, right = as_hosts_apply(up, down, alpha)
        return {layer.module + WHOLE: (left @ right).to(WHOLE_DTYPE).view(layer.shape)}
    rank = up.shape[1]
    tensors = {
        layer.down_key: down.reshape(layer.down_shape(rank)),
        layer.up_key: up.reshape(layer.up_shape(rank)),
    }
    if alpha is not None:
        value = torch.tensor(alpha, dtype=_alpha_dtype(alpha, up.dtype))
        tensors[layer.module + ALPHA] = value
    return tensors


def _rank(layer: Layer, factors: FactorsByModule) -> int:
    return factors[layer.module][0].shape[1] if layer.module in factors else 0


def _zeros(layer: Layer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # (m, 1), (1, n)
    return torch.zeros(layer.m, 1, dtype=dtype), torch.zeros(1, layer.n, dtype=dtype)


def _alpha_dtype(alpha: float, dtype: torch.dtype) -> torch.dtype:
    """Returns the type of a stored alpha: that of the factors, as in Kohya's files, if exact.

    bfloat16 cannot hold every whole number above 256, and hosts cannot calculate with 8 bits.
    """
    exact = dtype != FLOAT8 and float(torch.tensor(alpha, dtype=dtype)) == alpha
    return dtype if exact else torch.float32
