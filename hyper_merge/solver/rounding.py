"""Rounds one side of a layer's blocks as files hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.loras.lora_file import StoredFormat, applied_factor, stored_factor
from hyper_merge.solver.block_sides import BlockSide, InnerProducts, LayerSide
from hyper_merge.solver.products import FactorPair

UPS, DOWNS = 0, 1
"""The sides of a layer."""


@dataclass(frozen=True, eq=False)
class RoundedSide:
    """One side of a layer's blocks as files hold it.

    Attributes:
        stored: Of every block the up (m, r) or the down (r, n), in the files' type.
        columns: (m, r), of all blocks, as hosts apply them.
        exact: Before they were rounded.
        layer: The same side of the layer.
    """

    stored: list[Tensor]
    columns: Tensor
    exact: BlockSide
    layer: LayerSide

    @cached_property
    def applied(self) -> BlockSide:
        """The side as hosts apply it."""
        return self.exact.rounded(self.layer.basis, self.columns)

    @cached_property
    def inner(self) -> InnerProducts:
        """What inner products with the columns that hosts apply need."""
        return self.applied.inner(self.layer)


RoundedSides = tuple[RoundedSide, RoundedSide]  # ups, downs


@dataclass(frozen=True, eq=False)
class Rounding:
    """How a layer's blocks are rounded.

    Attributes:
        layer: Whose blocks they are.
        sides: Of the layer, in the order of `UPS` and `DOWNS`.
        ranks: Of the R blocks.
        formats: Of the R files.
    """

    layer: Layer
    sides: tuple[LayerSide, LayerSide]
    ranks: Sequence[int]
    formats: Sequence[StoredFormat]

    def side(self, exact: BlockSide, place: int) -> RoundedSide:
        """Returns the ups or the downs, scaled and rounded.

        Args:
            exact: as they are to be.
            place: `UPS` or `DOWNS`.

        Raises:
            NonFiniteError: the type cannot hold a factor.
        """
        stored, applied = [], []
        by_block = torch.split(exact.columns, list(self.ranks), 1)
        for columns, rank, form in zip(by_block, self.ranks, self.formats, strict=True):
            factor = columns if place == UPS else columns.mT.contiguous()
            stored.append(stored_factor(self.layer, factor, rank, form))
            rounded = applied_factor(stored[-1], rank, form.alpha)
            applied.append(rounded if place == UPS else rounded.mT)
        return RoundedSide(stored, torch.cat(applied, 1), exact, self.sides[place])


def stored_pairs(sides: RoundedSides) -> list[FactorPair]:  # per block (m, r), (r, n)
    """Returns the blocks as files hold them."""
    ups, downs = sides
    return list(zip(ups.stored, downs.stored, strict=True))
