"""Symmetric maps that stretch space along a few directions, and metrics of matrices made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_LEAST: Final = 1e-12  # of a squared factor, against rounding


@dataclass(frozen=True, eq=False)
class Stretch:
    """The map I + V diag(factors - 1) V^T.

    Attributes:
        directions: (m, r), V: orthonormal columns.
        factors: (r,), positive, by which vectors along them grow.
    """

    directions: Tensor
    factors: Tensor

    @classmethod
    def none(cls, size: int) -> Stretch:
        """Returns the map that leaves vectors of a size as they are."""
        return cls(torch.zeros(size, 0), torch.zeros(0))

    @classmethod
    def from_square(
        cls,
        within: Tensor,  # (p, r), any columns
        gains: Tensor,  # (r,), such that the square is positive
    ) -> Stretch:
        """Returns the root of I + within diag(gains) within^T."""
        q, triangle = torch.linalg.qr(within.double())
        values, vectors = torch.linalg.eigh((triangle * gains.double()) @ triangle.mT)
        return cls((q @ vectors).float(), (1 + values).clamp(min=_LEAST).sqrt().float())

    @property
    def changes_nothing(self) -> bool:
        """Whether it is the identity."""
        return not len(self.factors)

    @property
    def gains(self) -> Tensor:  # (r,)
        """What the squares of lengths along the directions grow by, less 1."""
        return self.factors.square() - 1

    @property
    def root(self) -> Stretch:
        """The map that, applied twice, is this one."""
        return Stretch(self.directions, self.factors.sqrt())

    @property
    def inverse(self) -> Stretch:
        """The map that undoes it."""
        return Stretch(self.directions, self.factors.reciprocal())

    def apply(
        self,
        columns: Tensor,  # (m, c) or (b, m, c)
    ) -> Tensor:  # of the same shape
        """Returns the mapped columns."""
        if self.changes_nothing:
            return columns
        directions = self.directions.to(columns)
        along = (self.factors.to(columns) - 1)[:, None] * (directions.mT @ columns)
        if columns.dim() == 2:
            return torch.addmm(columns, directions, along)
        return torch.baddbmm(columns, directions.expand(len(columns), -1, -1), along)

    def apply_to_rows_(
        self,
        rows: Tensor,  # (c, m) or (b, c, m)
    ) -> None:
        """Maps the rows in place."""
        if self.changes_nothing:
            return
        directions = self.directions.to(rows)
        along = (rows @ directions) * (self.factors.to(rows) - 1)
        if rows.dim() == 2:
            rows.addmm_(along, directions.mT)
        else:
            rows.baddbmm_(along, directions.mT.expand(len(rows), -1, -1))


@dataclass(frozen=True, eq=False)
class LayerMetric:
    """Counts the squared error of a matrix as scale * |left error right|^2.

    Attributes:
        scale: By which plain squared errors are multiplied.
        left: Acts on the rows' index, m.
        right: Acts on the columns' index, n.
    """

    scale: float
    left: Stretch
    right: Stretch

    @property
    def is_plain(self) -> bool:
        """Whether it counts all errors of a size alike."""
        return self.left.changes_nothing and self.right.changes_nothing

    @property
    def transposed(self) -> LayerMetric:
        """The metric of transposed matrices."""
        return LayerMetric(self.scale, self.right, self.left)

    def scaled(self, factor: float) -> LayerMetric:
        """Returns the metric that counts errors so many times as much."""
        return LayerMetric(self.scale * factor, self.left, self.right)

    def apply(
        self,
        matrices: Tensor,  # (m, n) or (b, m, n)
    ) -> Tensor:  # of the same shape
        """Returns matrices whose plain squared norms are those of the metric."""
        if self.is_plain:
            return matrices if self.scale == 1 else matrices * self.scale**0.5
        stretched = self.left.apply(matrices)
        if stretched is matrices:
            stretched = matrices.clone()
        self.right.apply_to_rows_(stretched)
        return stretched.mul_(self.scale**0.5)

    def apply_to_factors(
        self,
        up: Tensor,  # (m, r)
        down: Tensor,  # (r, n)
    ) -> tuple[Tensor, Tensor]:  # (m, r), (r, n)
        """Returns factors of what `apply` makes of their product."""
        return self.left.apply(up) * self.scale**0.5, self.right.apply(down.mT).mT

    def undo(
        self,
        up: Tensor,  # (m, r)
        down: Tensor,  # (r, n)
    ) -> tuple[Tensor, Tensor]:  # (m, r), (r, n)
        """Returns the factors of which `apply_to_factors` makes these."""
        return (
            self.left.inverse.apply(up) / self.scale**0.5,
            self.right.inverse.apply(down.mT).mT,
        )

    def dual(
        self,
        up: Tensor,  # (m, r)
        down: Tensor,  # (r, n)
    ) -> tuple[Tensor, Tensor]:  # (m, r), (r, n)
        """Returns factors whose plain inner products with matrices are the metric's with these."""
        return (
            self.left.apply(self.left.apply(up)) * self.scale,
            self.right.apply(self.right.apply(down.mT)).mT,
        )
