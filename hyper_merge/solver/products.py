"""Holds blocks as files hold them, with the inner products from which multipliers and losses follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyper_merge.decomposition.ll1 import Statistics
from hyper_merge.decomposition.problem import Keep

FactorPair = tuple[Tensor, Tensor]  # (m, r), (r, n)


def keep_pairs(keep: Keep, pairs: Sequence[FactorPair]) -> list[FactorPair]:
    """Returns pairs that are put aside together."""
    tensors = iter(keep([tensor for pair in pairs for tensor in pair]))
    return list(zip(tensors, tensors, strict=True))


@dataclass(frozen=True, eq=False)
class Products:
    """Inner products of every layer in one metric; float64."""

    cross: Tensor  # (layers, rows, R), <row, block>
    gram: Tensor  # (layers, R, R), <block, block>

    def of(
        self,
        rows: Tensor,  # (k, rows)
    ) -> Products:
        """Returns the products of linear combinations of the rows."""
        return Products(rows @ self.cross, self.gram)

    def statistics(self, members: Sequence[int], energy: float) -> Statistics:
        """Returns the sums over some layers, whose rows have this energy."""
        inside = list(members)
        return Statistics(energy, self.cross[inside].sum(0), self.gram[inside].sum(0))

    def errors(
        self,
        members: Sequence[int],
        energies: Tensor,  # (layers, rows)
        multipliers: Tensor,  # (rows, R)
    ) -> Tensor:  # (members, rows)
        """Returns what multipliers leave of the rows in some layers."""
        inside = list(members)
        squares = torch.einsum("kr,lrs,ks->lk", multipliers, self.gram[inside], multipliers)
        explained = 2 * (self.cross[inside] * multipliers).sum(2) - squares
        return (energies[inside] - explained).clamp(min=0)


@dataclass(frozen=True, eq=False)
class StoredFactors:
    """Blocks as the files will hold them, with all that multipliers and losses need."""

    factors: list[list[FactorPair]]  # per layer and block: (m, r), (r, n), as stored
    plain: Products  # with slices and, last, the average's rounding error
    weighted: Products  # the same as the loss counts them
    alphas: tuple[float | None, ...]  # of the R files

    @property
    def ranks(self) -> list[tuple[int, ...]]:
        """The ranks of the R blocks, per layer."""
        return [tuple(up.shape[1] for up, _ in pairs) for pairs in self.factors]
