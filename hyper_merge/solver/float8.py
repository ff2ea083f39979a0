"""Prepares LoRAs for 8 bits: an alpha that brings them into range, and a fit after rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hyper_merge.checkpoints.io.dtypes import FLOAT8
from hyper_merge.decomposition.linalg import largest_values
from hyper_merge.decomposition.ll1 import update_downs, update_ups
from hyper_merge.decomposition.problem import Batch, Factors
from hyper_merge.solver.block_sides import BlockSide, padded
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


def rounded_and_refitted(
    target: RefitTarget,
    rounding: Rounding,  # to float8
    within: tuple[Tensor, Tensor],  # (p' <= p, r), (q' <= q, r)
    check: Callable[[], None] = lambda: None,
) -> RoundedSides:
    """Rounds blocks between the layer's bases: each side is fitted to the other as it is stored.

    Blocks that partly cancel each other have far more energy than their sum, and all of it is
    rounded. A fit to the rounded side removes some of that error, and lets the blocks cancel
    less. Ups are fitted to rounded downs, downs to these, and ups again. Where a fit leaves the range
    of the type, the blocks stay as they were before it.

    Args:
        target: the slices that the blocks approximate.
        rounding: of the layer's blocks.
        within: ups and downs in the layer's bases.
        check: called before every fit; may raise, to stop.

    Raises:
        NonFiniteError: the type cannot hold a factor.
    """
    mixtures = target.batch(rounding.ranks).mixtures(target.multipliers)
    former = [
        padded(side, of_layer.basis.shape[1])
        for side, of_layer in zip(within, rounding.sides, strict=True)
    ]
    rounded = {DOWNS: rounding.side(rounding.spanned(within[DOWNS], DOWNS), DOWNS)}
    for place in _SIDES:
        check()
        other = rounded[1 - place]
        fitted = _fitted(rounding, target, mixtures, former[place], other, place)
        # Bases are orthonormal: inner products within them are those of the columns.
        gram = fitted.within.mT @ fitted.within
        if not is_in_range(rounding, fitted.columns, gram, other.inner.gram):
            break
        former[place], rounded[place] = fitted.within, rounding.side(fitted, place)
    if UPS not in rounded:
        rounded[UPS] = rounding.side(rounding.spanned(within[UPS], UPS), UPS)
    return rounded[UPS], rounded[DOWNS]


def _fitted(
    rounding: Rounding,
    target: RefitTarget,
    mixtures: Tensor,
    former: Tensor,
    other: RoundedSide,
    place: int,
) -> BlockSide:
    """Returns the least-squares columns of one side for the other, also outside of its basis.

    What the metric does on the side that is fitted changes nothing: columns of any form are at hand.

    Args:
        rounding: of the blocks.
        target: what they approximate.
        mixtures: (1, R, p, q), of its slices.
        former: (p, r), about what the columns are in their basis.
        other: the other side.
        place: of the side that is fitted.
    """
    batch = target.batch(rounding.ranks)
    own, dual = former[None], other.inner.dual[None]
    ups, downs = (own, dual) if place == UPS else (dual, own)
    update = update_ups if place == UPS else update_downs
    inner = other.inner.weighted_gram[None]
    new = update(batch, Factors(ups, downs.mT), target.multipliers, mixtures, inner)
    within = new.up if place == UPS else new.down.mT
    return rounding.spanned(within[0], place)


def is_in_range(
    rounding: Rounding,
    fitted: Tensor,  # (m, r), columns of all blocks on one side
    gram: Tensor,  # (r, r), their inner products
    other: Tensor,  # (r, r), those of columns on the other side that float8 holds
) -> bool:
    """Tells whether float8 holds the columns, and float16 the products that hosts form of the blocks."""
    roots = rounding.roots
    if not fitted.numel() or not float((fitted * roots).abs().amax()) <= torch.finfo(FLOAT8).max:
        return not fitted.numel()
    squares = roots * roots[:, None]
    gram, other = gram * squares, other * squares
    # No singular value is larger than that, and in most layers it suffices.
    if float(gram.norm() * other.norm()) <= _LARGEST_PRODUCT**2:
        return True
    largest = largest_values(gram, other, rounding.ranks)
    return all(value <= _LARGEST_PRODUCT for value in largest)
