"""Shapes that must agree within one file, whatever its family and its widths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import Final

from hyper_merge.checkpoints.architectures.spec import Family
from hyper_merge.checkpoints.io.header import Header, Shape, TensorInfo
from hyper_merge.errors import FamilyError

_WEIGHT: Final = re.compile(r"(.+[._])weight")
# Query, key and value in one matrix: three squares above one another.
_FUSED: Final = re.compile(r".+(\.attn\.in_proj_weight|[._]attn\d?\.qkv\.weight)")
# Projections of one attention: the values' rows are what the output reads.
_ATTENTION: Final = re.compile(r"(.+\.)(to_[qkv]|[qkv]_proj)\.weight")
_OUTPUTS: Final = {
    **dict.fromkeys(("to_q", "to_k", "to_v"), "to_out.0.weight"),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "out_proj.weight"),
}
_DIMENSIONS: Final = (2, 4)  # of a weight that takes a LoRA: a matrix or a convolution


def require_consistent_shapes(header: Header, family: Family) -> None:
    """Returns if no two shapes of the networks and the VAE contradict each other, and no layer is empty.

    A bias has an entry for each row of its weight, a fused attention three squares above one another, and
    the projections of an attention as many rows as its output has columns; layers are matrices or
    convolutions. What nobody runs may have any shape.

    Args:
        header: of a checkpoint.
        family: of the same.

    Raises:
        FamilyError: a shape contradicts another one, and names both; or a layer is empty.
    """
    prefixes = (*(part.prefix for part in family.parts), *family.vae_prefixes)
    tensors = {
        key: info
        for key, info in header.tensors.items()
        if key.startswith(prefixes) and not key.startswith(family.idle)
    }
    filled = {key: info for key, info in tensors.items() if info.numel}
    contradiction = next(chain(_empty(tensors, family), _contradictions(filled, family)), None)
    if contradiction:
        key, reason = contradiction
        raise FamilyError(
            f"{header.name} contradicts itself: {key} has the shape"
            f" {list(tensors[key].shape)}, {reason}",
            hint="use an undamaged copy of the file, or leave it out",
            file=header.path,
            key=key,
        )


def _empty(tensors: dict[str, TensorInfo], family: Family) -> Iterator[tuple[str, str]]:
    """Yields the key of every layer without an entry, and the reason; other tensors may be marks."""
    for key, info in tensors.items():
        if info.numel or not _WEIGHT.fullmatch(key):
            continue
        if _FUSED.fullmatch(key) or _is_layer(key, info.shape, family):
            yield key, "which holds nothing"


def _contradictions(tensors: dict[str, TensorInfo], family: Family) -> Iterator[tuple[str, str]]:
    """Yields the key of every tensor that contradicts another, and the reason."""
    for key, info in tensors.items():
        weight = _WEIGHT.fullmatch(key)
        if weight is None:
            continue
        bias = tensors.get(weight[1] + "bias")
        if bias and bias.shape != info.shape[:1]:
            yield key, f"and its bias has {list(bias.shape)}"
        if _FUSED.fullmatch(key) and not _is_three_squares(info.shape):
            yield key, "not three times as high as wide"
        attention = _ATTENTION.fullmatch(key)
        end = attention[1] + _OUTPUTS[attention[2]] if attention else ""
        if end in tensors and tensors[end].shape[1:2] != info.shape[:1]:
            yield key, f"and {end} has {list(tensors[end].shape)}"
        if len(info.shape) not in _DIMENSIONS and _is_layer(key, info.shape, family):
            yield key, "neither a matrix nor a convolution"


def _is_three_squares(shape: Shape) -> bool:
    return len(shape) == 2 and shape[0] == 3 * shape[1]


def _is_layer(key: str, shape: Shape, family: Family) -> bool:
    """Tells whether a tensor takes a LoRA by its name."""
    return any(
        part.modules(key.removeprefix(part.prefix).removesuffix(".weight"), shape)
        for part in family.parts
        if key.startswith(part.prefix)
    )
