"""Prepares LoRAs for 8 bits: an alpha that brings them into range, and a fit after rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hyper_merge.checkpoints.io.dtypes import FLOAT8
from hyper_merge.decomposition.linalg import largest_value
from hyper_merge.decomposition.ll1 import update_downs, update_ups
from hyper_merge.decomposition.problem import Batch, Factors
from hyper_merge.loras.lora_file import StoredFormat
from hyper_merge.solver.block_sides import BlockSide
from hyper_merge.solver.rounding import DOWNS, UPS, RoundedSide, RoundedSides, Rounding

# Limits of the product that AUTOMATIC1111 forms in float16, which ends at 65504, before it scales it.
_PRODUCT: Final = 2.0**15
_LARGEST_PRODUCT: Final = 6e4

_SIDES: Final = (UPS, DOWNS, UPS)


def float8_alpha(size: float) -> float:
    """Returns the alpha that brings a file's factors into the range of float8.

    A layer's stored factors are up and down times root(rank / alpha). With the largest singular value
    s of up @ down their entries are at most root(s * rank / alpha), if that is shared evenly, and those
    of their product at most s * rank / alpha. That is to be at most 2**15: half of what float16 holds,
    and 181 in the factors, where float8 holds 448, and three bits of everything above 2**-6.

    Args:
        size: largest s * rank of all layers.

    Returns:
        A power of two: exact in every type.
    """
    if not 0 < size < math.inf:
        return 1.0
    return 2.0 ** math.ceil(math.log2(size / _PRODUCT))


@dataclass(frozen=True, eq=False)
class RefitTarget:
    """The slices that the blocks of a layer approximate, with the blocks' multipliers."""

    slices: Tensor  # (d, p, q)
    multipliers: Tensor  # (d, R)

    def batch(self, ranks: Sequence[int]) -> Batch:
        """Returns the layer as a batch of its own."""
        return Batch(self.slices[None], tuple(ranks), (0,))


def refit(
    target: RefitTarget,
    rounding: Rounding,  # to float8
    sides: RoundedSides,
    check: Callable[[], None] = lambda: None,
) -> RoundedSides:
    """Fits ups, downs, and ups again to the other side as it is stored, and rounds each.

    Blocks that partly cancel each other have far more energy than their sum, and all of it is
    rounded. A fit to the rounded side removes some of that error, and lets the blocks cancel
    less. Where a fit leaves the range of the type, the blocks stay as they were before it.

    Args:
        target: the slices that the blocks approximate.
        rounding: of the layer's blocks.
        sides: as they were rounded.
        check: called before every fit; may raise, to stop.
    """
    mixtures = target.batch(rounding.ranks).mixtures(target.multipliers)
    rounded = list(sides)
    for place in _SIDES:
        check()
        fitted = _fitted(rounding, target, mixtures, rounded, place)
        if not is_in_range(rounding, fitted.columns, rounded[1 - place].columns):
            break
        rounded[place] = rounding.side(fitted, place)
    return rounded[UPS], rounded[DOWNS]


def _fitted(
    rounding: Rounding,
    target: RefitTarget,
    mixtures: Tensor,
    sides: Sequence[RoundedSide],
    place: int,
) -> BlockSide:
    """Returns the least-squares columns of one side for the other, also outside of its basis.

    What the metric does on the side that is fitted changes nothing: columns of any form are at hand.

    Args:
        rounding: of the blocks.
        target: what they approximate.
        mixtures: (1, R, p, q), of its slices.
        sides: ups and downs.
        place: of the side that is fitted.
    """
    batch = target.batch(rounding.ranks)
    products = sides[1 - place].inner
    former, dual = sides[place].applied.within[None], products.dual[None]
    ups, downs = (former, dual) if place == UPS else (dual, former)
    update = update_ups if place == UPS else update_downs
    inner = products.weighted_gram[None]
    new = update(batch, Factors(ups, downs.mT), target.multipliers, mixtures, inner)
    within = new.up if place == UPS else new.down.mT
    return BlockSide.expanded(rounding.sides[place].basis, within[0])


def is_in_range(
    rounding: Rounding,
    fitted: Tensor,  # (m, r), columns of all blocks on one side
    other: Tensor,  # (n, r), on the other
) -> bool:
    """Tells whether float8 holds the blocks, and float16 the products that hosts form of them."""
    ranks = list(rounding.ranks)
    sides = (torch.split(side, ranks, 1) for side in (fitted, other))
    blocks = zip(*sides, rounding.formats, strict=True)
    return all(_block_is_in_range(*block) for block in blocks)


def _block_is_in_range(one: Tensor, other: Tensor, stored: StoredFormat) -> bool:
    rank = one.shape[1]
    if not rank or stored.alpha is None:
        return True
    peak = max(float(one.abs().amax()), float(other.abs().amax()))
    entries_fit = peak * math.sqrt(rank / stored.alpha) <= torch.finfo(FLOAT8).max
    return entries_fit and largest_value(one, other.mT) * rank / stored.alpha <= _LARGEST_PRODUCT
