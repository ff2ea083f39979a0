"""Sweeps over one layer whose slices are given as factors: no slice, and no mixture of slices, is formed.

With many slices of low rank that takes a fraction of what the slices themselves do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyper_merge.decomposition.linalg import solve_damped
from hyper_merge.decomposition.problem import Batch, Factors


@dataclass(frozen=True, eq=False)
class FactoredBatch(Batch):
    """One layer, each slice of which is the sum of its components `ups[:, s] @ downs[s]`.

    Attributes:
        components: Returns ups (p, S) and downs (S, q).
        owners: (S,): the slice of each component.
    """

    components: Callable[[], tuple[Tensor, Tensor]]
    owners: Tensor

    def of_layer(self, place: int, ranks: tuple[int, ...]) -> Batch:  # noqa: ARG002 - it has one
        """Returns the layer with other ranks."""
        return replace(self, ranks=ranks)

    def swept(
        self,
        old: Factors,
        multipliers: Tensor,  # (k, R)
        ridge: float,
    ) -> tuple[Factors, tuple[Tensor, Tensor]]:  # cross (k, R) and gram (R, R), float64
        """Returns the best ups for these downs, then the best downs, and their inner products."""
        ups, downs = self.components()
        mode3 = multipliers.mT @ multipliers
        mode3 = (mode3 + ridge * torch.diag_embed(mode3.diagonal())).to(ups)
        mode3 = mode3[self.block_of][:, self.block_of]
        weights = multipliers.to(ups)[self.owners][:, self.block_of]  # (S, rho)
        up, down = old.up[0], old.down[0]
        right = ups @ (weights * (downs @ down.mT))
        up = solve_damped(right, mode3 * (down @ down.mT), up)
        along, inner = ups.mT @ up, up.mT @ up
        right = downs.mT @ (weights * along)
        down = solve_damped(right, mode3 * inner, down.mT).mT
        of_slice = torch.nn.functional.one_hot(self.owners, len(multipliers)).to(ups)
        of_block = torch.nn.functional.one_hot(self.block_of, len(self.ranks)).to(ups)
        cross = of_slice.mT @ (along * (downs @ down.mT)) @ of_block
        gram = of_block.mT @ (inner * (down @ down.mT)) @ of_block
        return Factors(up[None], down[None]), (cross.double(), gram.double())
