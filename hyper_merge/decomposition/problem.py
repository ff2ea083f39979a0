"""Describes the cores of all layers in batches, and the blocks that are fitted to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from hyper_merge.decomposition.linalg import moved

Keep = Callable[[Sequence[Tensor]], list[Tensor]]
"""Puts tensors aside that are needed later, and returns equal ones."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Layers of one core shape and one list of ranks, stacked.

    Attributes:
        source: The slices (b, k, p, q), or what makes them whenever they are needed: not all layers'
            need lie in memory at once.
        ranks: Of the R blocks, in these layers.
        layers: Which layers these are, b indices.
    """

    source: Tensor | Callable[[], Tensor]
    ranks: tuple[int, ...]
    layers: tuple[int, ...]

    @property
    def slices(self) -> Tensor:  # (b, k, p, q)
        """The slices, made anew unless they are in memory."""
        return self.source if isinstance(self.source, Tensor) else self.source()

    @property
    def device(self) -> torch.device:
        """Where the slices are; those that are made when they are needed are made on the CPU."""
        return self.source.device if isinstance(self.source, Tensor) else torch.device("cpu")

    def of_layer(self, place: int, ranks: tuple[int, ...]) -> Batch:
        """Returns one of the layers as a batch of its own, with other ranks."""
        source = self.source
        if isinstance(source, Tensor):
            return Batch(source[place][None], ranks, (self.layers[place],))
        if len(self.layers) == 1:
            return Batch(source, ranks, self.layers)
        return Batch(partial(_slices_at, source, place), ranks, (self.layers[place],))

    def loaded(self) -> Batch:
        """Returns the batch with its slices in memory."""
        return self if isinstance(self.source, Tensor) else replace(self, source=self.source())

    @cached_property
    def spans(self) -> tuple[slice, ...]:
        """The columns of each block, among all columns."""
        ends = (0, *accumulate(self.ranks))
        return tuple(slice(start, end) for start, end in pairwise(ends))

    @cached_property
    def block_of(self) -> Tensor:  # (rho,)
        """The block to which each column belongs."""
        blocks = torch.arange(len(self.ranks)).repeat_interleave(torch.tensor(self.ranks))
        return moved(blocks, self.device)

    def mixtures(
        self,
        multipliers: Tensor,  # (k, R)
    ) -> Tensor:  # (b, R, p, q)
        """Returns `sum_c multipliers[c, r] * slices[c]` for every block."""
        slices = self.slices
        multipliers = moved(multipliers.to(slices.dtype), slices.device)
        flat = multipliers.mT @ slices.flatten(2)
        return flat.view(*flat.shape[:2], *slices.shape[2:])


def _slices_at(source: Callable[[], Tensor], place: int) -> Tensor:  # (1, k, p, q)
    return source()[place][None]


@dataclass(frozen=True, eq=False)
class Problem:
    """All layers, and what the loss is a fraction of."""

    batches: tuple[Batch, ...]
    energy: float  # sum of squares of all slices, in and outside of the cores
    # Over batches, with pure functions of them; the result does not depend on it.
    parallel: Callable[..., Iterable[Any]] = map
    ridge: float = 0.0  # what the blocks' energies count in addition
    # Puts aside what is needed for every layer.
    keep: Keep = list
    nearby: Callable[..., Iterable[Any]] | None = None  # over what is small; None for `parallel`

    @property
    def near(self) -> Problem:
        """The problem with a map that takes no work to other processes."""
        return replace(self, parallel=self.nearby or self.parallel)

    @property
    def shape(self) -> tuple[int, int]:
        """The number of slices k and of blocks R."""
        first = self.batches[0]
        return first.slices.shape[1], len(first.ranks)


@dataclass(frozen=True, eq=False)
class Factors:
    """The blocks of one batch, side by side."""

    up: Tensor  # (b, p, rho)
    down: Tensor  # (b, rho, q)

    def kept(self, keep: Keep) -> Factors:
        """Returns equal factors that are put aside."""
        return Factors(*keep([self.up, self.down]))
