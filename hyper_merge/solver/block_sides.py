"""One side of a layer's blocks: all ups next to each other, or all downs, transposed.

Columns as long as a layer are brought into its basis many times while they are rounded. What they were
before a rounding is known in the basis, so that their difference alone is projected.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hyper_merge.decomposition.linalg import block_columns
from hyper_merge.decomposition.stretch import Stretch


@dataclass(frozen=True, eq=False)
class LayerSide:
    """One side of a layer.

    Attributes:
        basis: (m, p).
        stretch: What the metric does to columns of m entries.
    """

    basis: Tensor
    stretch: Stretch

    @cached_property
    def directions(self) -> Tensor:  # (p, c)
        """The stretch's directions in the basis."""
        return block_columns(self.basis, self.stretch.directions.to(self.basis))


def padded(
    within: Tensor,  # (p' <= p, r), in a basis's first columns
    count: int,
) -> Tensor:  # (p, r)
    """Returns columns in a basis of so many columns."""
    missing = count - len(within)
    return torch.nn.functional.pad(within, (0, 0, 0, missing)) if missing else within


@dataclass(frozen=True, eq=False)
class BlockSide:
    """Columns of all blocks of a layer on one side.

    Attributes:
        columns: (m, r), in the layer's own coordinates.
        within: (p, r), their parts in the layer's basis.
    """

    columns: Tensor
    within: Tensor

    @classmethod
    def expanded(
        cls,
        basis: Tensor,  # (m, p)
        within: Tensor,  # (p' <= p, r), in the basis's first columns
    ) -> BlockSide:
        """Returns columns that lie in the basis."""
        return cls(basis[:, : len(within)] @ within, padded(within, basis.shape[1]))

    def rounded(
        self,
        basis: Tensor,  # (m, p)
        columns: Tensor,  # (m, r)
    ) -> BlockSide:
        """Returns the side with other columns, which are nearly these."""
        return BlockSide(columns, self.within + basis.mT @ (columns - self.columns))

    def inner(self, layer: LayerSide) -> InnerProducts:
        """Returns what inner products with the columns need, also where a metric stretches them.

        With the stretch S = I + V diag(factors - 1) V^T the square is I + V diag(gains) V^T: only the
        parts along V change, so that no second set of columns as long as the layer is formed.
        """
        gram, stretch = self.columns.mT @ self.columns, layer.stretch
        if stretch.changes_nothing:
            return InnerProducts(self.within, gram, gram)
        along = stretch.directions.to(self.columns).mT @ self.columns
        grown = stretch.gains.to(self.columns)[:, None] * along
        dual = self.within + layer.directions @ grown
        return InnerProducts(dual, gram, gram + along.mT @ grown)


@dataclass(frozen=True, eq=False)
class InnerProducts:
    """Inner products of columns in a metric.

    Attributes:
        dual: (p, r), the columns stretched twice, in the basis: their plain inner products with what
            lies in the basis are those of the metric.
        gram: (r, r), of the columns, plain.
        weighted_gram: (r, r), of the stretched columns.
    """

    dual: Tensor
    gram: Tensor
    weighted_gram: Tensor
