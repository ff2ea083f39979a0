"""Sweeps over layers whose slices are given as factors: no slice, and no mixture of slices, is formed.

With many slices of low rank that takes a fraction of what the slices themselves do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from hyper_merge.decomposition.linalg import solve_damped
from hyper_merge.decomposition.problem import Batch, Factors

_TOGETHER: Final = 2**18  # numbers in the components of layers that are worked on together

Form = tuple[int, int, tuple[int, ...]]
"""The sides p and q of a layer's core, and the slice of each of its components."""


def layers_of_one_form(forms: Sequence[Form]) -> list[list[int]]:
    """Returns the places of layers of one form together, as many as are small enough for that."""
    groups: dict[Form, list[list[int]]] = {}
    for place, (p, q, owners) in enumerate(forms):
        most = max(_TOGETHER // max((p + q) * len(owners), 1), 1)
        lists = groups.setdefault((p, q, owners), [[]])
        if len(lists[-1]) == most:
            lists.append([])
        lists[-1].append(place)
    return sorted(places for lists in groups.values() for places in lists)


@dataclass(frozen=True, eq=False)
class FactoredBatch(Batch):
    """One layer, each slice of which is the sum of its components `ups[:, s] @ downs[s]`.

    `SweptTogether` sweeps over it.

    Attributes:
        components: Returns ups (p, S) and downs (S, q).
        owners: (S,): the slice of each component.
        form: By which `layers_of_one_form` tells what can be swept together.
    """

    components: Callable[[], tuple[Tensor, Tensor]]
    owners: Tensor
    form: Form

    def of_layer(self, place: int, ranks: tuple[int, ...]) -> Batch:  # noqa: ARG002 - it has one
        """Returns the layer with other ranks."""
        return replace(self, ranks=ranks)


@dataclass(frozen=True, eq=False)
class SweptTogether(Batch):
    """Layers of one form whose ranks differ: columns beyond a layer's ranks are zeros.

    Each is small, and there are many: one after the other they take several times as long, most of it
    between two operations, and a second thread is no help.

    Attributes:
        layers_alone: Each with ranks of its own; those of the batch mean nothing.
    """

    layers_alone: tuple[FactoredBatch, ...]

    @classmethod
    def of(cls, batches: Sequence[FactoredBatch]) -> SweptTogether:
        """Returns layers of one form as a batch."""
        layers = tuple(index for batch in batches for index in batch.layers)
        return cls(batches[0].source, batches[0].ranks, layers, tuple(batches))

    def padded(self, factors: Sequence[Factors]) -> Factors:  # (b, p, rho), (b, rho, q)
        """Returns the factors of all layers, of one layer each, side by side."""
        width = self._block_of.shape[1]
        return Factors(
            torch.cat([pad(each.up, (0, width - each.up.shape[2])) for each in factors]),
            torch.cat([pad(each.down, (0, 0, 0, width - each.down.shape[1])) for each in factors]),
        )

    def parts(self, factors: Factors) -> Iterator[Factors]:
        """Yields the factors of each layer."""
        for place, batch in enumerate(self.layers_alone):
            rank = sum(batch.ranks)
            yield Factors(factors.up[place, :, :rank][None], factors.down[place, :rank][None])

    @cached_property
    def _block_of(self) -> Tensor:  # (b, rho)
        """The block of each column of each layer; R, which is none, for zeros."""
        blocks, width = len(self.ranks), max(sum(batch.ranks) for batch in self.layers_alone)
        columns = torch.full((len(self.layers_alone), width), blocks)
        for row, batch in zip(columns, self.layers_alone, strict=True):
            row[: sum(batch.ranks)] = batch.block_of
        return columns

    def swept(
        self,
        old: Factors,  # (b, p, rho), (b, rho, q)
        multipliers: Tensor,  # (k, R)
        ridge: float,
    ) -> tuple[Factors, tuple[Tensor, Tensor]]:  # cross (k, R) and gram (R, R), float64
        """Returns the best ups for these downs, then the best downs, and their inner products."""
        components = [batch.components() for batch in self.layers_alone]
        ups, downs = (torch.stack(side) for side in zip(*components, strict=True))
        owners, block_of = self.layers_alone[0].owners, self._block_of
        mode3 = multipliers.mT @ multipliers
        mode3 = pad((mode3 + ridge * torch.diag_embed(mode3.diagonal())).to(ups), (0, 1, 0, 1))
        mode3 = mode3[block_of[:, :, None], block_of[:, None]]  # (b, rho, rho)
        extended = pad(multipliers.to(ups), (0, 1))
        weights = extended[owners[:, None], block_of[:, None]]  # (b, S, rho)
        up, down = old.up, old.down
        right = ups @ (weights * (downs @ down.mT))
        up = solve_damped(right, mode3 * (down @ down.mT), up)
        along, inner = ups.mT @ up, up.mT @ up
        right = downs.mT @ (weights * along)
        down = solve_damped(right, mode3 * inner, down.mT).mT
        of_slice = one_hot(owners, len(multipliers)).to(ups)
        of_block = one_hot(block_of, len(self.ranks) + 1)[..., :-1].to(ups)
        cross = (of_slice.mT @ (along * (downs @ down.mT)) @ of_block).double().sum(0)
        gram = (of_block.mT @ (inner * (down @ down.mT)) @ of_block).double().sum(0)
        return Factors(up, down), (cross, gram)
