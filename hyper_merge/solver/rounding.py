"""Rounds one side of a layer's blocks as files hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.io.dtypes import widened
from hyper_merge.loras.lora_file import StoredFormat, stored_root, stored_values
from hyper_merge.solver.block_sides import BlockSide, InnerProducts, LayerSide
from hyper_merge.solver.products import FactorPair

UPS, DOWNS = 0, 1
"""The sides of a layer."""


@dataclass(frozen=True, eq=False)
class RoundedSide:
    """One side of a layer's blocks as files hold it.

    Attributes:
        values: (m, r), of all blocks, in the files' type.
        columns: (m, r), as hosts apply them.
        exact: Before they were rounded.
        layer: The same side of the layer.
    """

    values: Tensor
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

    @cached_property
    def roots(self) -> Tensor:  # (r,)
        """What files hold the columns of all blocks multiplied with."""
        roots = [
            stored_root(rank, form.alpha)
            for rank, form in zip(self.ranks, self.formats, strict=True)
        ]
        return torch.tensor(roots).repeat_interleave(torch.tensor(list(self.ranks)))

    def side(self, exact: BlockSide, place: int) -> RoundedSide:
        """Returns the ups or the downs, scaled and rounded.

        Args:
            exact: as they are to be.
            place: `UPS` or `DOWNS`.

        Raises:
            NonFiniteError: the type cannot hold a factor.
        """
        # All blocks at once: they are many where LoRAs are shared, and each is small.
        values = stored_values(self.layer, exact.columns * self.roots, self.formats[0].dtype)
        return RoundedSide(values, widened(values) / self.roots, exact, self.sides[place])

    def spanned(
        self,
        within: Tensor,  # (p' <= p, r)
        place: int,
    ) -> BlockSide:
        """Returns the ups or the downs that lie in the layer's basis."""
        return BlockSide.expanded(self.sides[place].basis, within)

    def stored_pairs(self, sides: RoundedSides) -> list[FactorPair]:  # per block (m, r), (r, n)
        """Returns the blocks as files hold them."""
        ups, downs = (torch.split(side.values, list(self.ranks), 1) for side in sides)
        # Copies, also of blocks without any rank: a view would keep all of the layer.
        return [(_copied(up), _copied(down.mT)) for up, down in zip(ups, downs, strict=True)]


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
