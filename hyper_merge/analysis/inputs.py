"""Describes and opens the files that a merge reads, with the settings that its average depends on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import EllipsisType

import torch

from hyper_merge.checkpoints.architectures.layout import Layer, Layout, Treatment, output_tensors
from hyper_merge.checkpoints.architectures.sections import section_of
from hyper_merge.checkpoints.architectures.signatures import UNET
from hyper_merge.checkpoints.io.header import Header, TensorInfo
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.decomposition.contrasts import (
    Contrasts,
    around_any_mean,
    around_base,
    around_mean,
)
from hyper_merge.errors import RecipeError
from hyper_merge.recipe.block_weights import BlockWeights, weight_of_block


@dataclass(frozen=True)
class MergeInputs:
    """The files of one merge with their common layout."""

    headers: tuple[Header, ...]  # of the k checkpoints
    base: Header | None  # of a base that the user gave; None for the average
    layout: Layout
    weights: tuple[float, ...]  # of the mean, one per checkpoint
    dtype: torch.dtype  # of the written average
    average_vae: bool = False  # instead of keeping the first checkpoint's
    block_weights: tuple[BlockWeights, ...] | None = None  # of the mean, one per checkpoint
    accepts_damaged: bool = False  # files that look so are named in warnings instead of refused

    @cached_property
    def contrasts(self) -> Contrasts:
        """The coordinates of the layers' deviations, where blocks have no weights of their own."""
        if self.base:
            return around_base(len(self.headers))
        return (around_any_mean if self.block_weights else around_mean)(self.weights)

    @property
    def read(self) -> tuple[Header, ...]:
        """The headers of all files, the origin of the deviations first."""
        return (self.base, *self.headers) if self.base else self.headers

    def contrasts_of(self, key: str) -> Contrasts:
        """Returns the coordinates for a tensor.

        Keeping the first checkpoint's VAE is an average of that checkpoint alone.

        Raises:
            RecipeError: no checkpoint has a weight in the tensor's block.
        """
        if self.layout.treatments[key] is Treatment.VAE and not self.base:
            return self.contrasts if self.average_vae else self._around_first
        if self.block_weights is None:
            return self.contrasts
        in_unet = key.startswith(UNET)
        section = section_of(key.removeprefix(UNET)) if in_unet else ""
        weights = [
            weight * weight_of_block(of_blocks, section, in_unet=in_unet)
            for weight, of_blocks in zip(self.weights, self.block_weights, strict=True)
        ]
        if not any(weights):
            block = section or "BASE"
            raise RecipeError(
                f"no checkpoint has a weight in the block {block}",
                hint="give at least one a number above 0 there",
                key="block_weights",
            )
        return around_any_mean(weights)

    def outputs(self) -> dict[str, TensorInfo]:
        """Returns types and shapes of the written average's tensors, by key."""
        return output_tensors(self.headers[0], self.layout, self.dtype)

    def pieces(self, key: str) -> Sequence[tuple[slice | EllipsisType, int | None]]:
        """Returns the rows of each layer in a tensor with the layer's index; several if it is fused.

        A tensor without a layer is one piece, also one that is a single number and has no rows.
        """
        return self._pieces.get(key) or [(..., None)]

    @cached_property
    def _pieces(self) -> dict[str, list[tuple[slice | EllipsisType, int | None]]]:
        """The pieces of every tensor that has layers, by key."""
        pieces: dict[str, list[tuple[slice | EllipsisType, int | None]]] = {}
        for index, layer in enumerate(self.layout.layers):
            rows = slice(*layer.rows) if layer.rows else slice(None)
            pieces.setdefault(layer.key, []).append((rows, index))
        return pieces

    @cached_property
    def _around_first(self) -> Contrasts:
        return around_mean([1.0] + [0.0] * (len(self.headers) - 1))


@contextmanager
def open_checkpoints(
    headers: Iterable[Header], *, mapped: bool = True, sparse: bool = False
) -> Iterator[list[CheckpointReader]]:
    """Opens files for reading within the block, in the order of their headers.

    Args:
        headers: of the files.
        mapped: false to read each tensor as a whole into memory of the process.
        sparse: whether only a small part of each tensor will be read.

    Raises:
        CheckpointError: a file cannot be read, or was changed since its header was read.
    """
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                CheckpointReader(header.path, expected=header, mapped=mapped, sparse=sparse)
            )
            for header in headers
        ]


def basis_columns(layer: Layer, width: int) -> tuple[int, int]:
    """Returns the columns (p, q) of a layer's bases when they have `width` at most."""
    return min(layer.m, width), min(layer.n, width)


def leading_columns(layer: Layer, shape: tuple[int, int], columns: int) -> tuple[int, int]:
    """Returns the first columns of a layer's bases, so many at most; all of square ones, which have no order.

    Args:
        layer: whose bases they are.
        shape: the columns (p, q) of both.
        columns: how many.
    """
    p, q = shape
    return (p if p == layer.m else min(p, columns), q if q == layer.n else min(q, columns))


def multiplier_groups(layers: Sequence[Layer], *, separate: bool) -> dict[str, list[int]]:
    """Returns the indices of layers that share multipliers, by part; one group is called "unet"."""
    if not separate or len({layer.part for layer in layers}) == 1:
        return {"unet": list(range(len(layers)))}
    groups: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        groups.setdefault(layer.part, []).append(index)
    return groups
