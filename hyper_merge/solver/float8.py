"""Prepares LoRAs for 8 bits: an alpha that brings them into range, and a fit after rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.io.dtypes import FLOAT8
from hyper_merge.decomposition.linalg import block_columns, largest_value
from hyper_merge.decomposition.ll1 import update_ups
from hyper_merge.decomposition.problem import Batch, Factors
from hyper_merge.decomposition.stretch import LayerMetric
from hyper_merge.loras.lora_file import as_hosts_apply, stored_factors
from hyper_merge.solver.products import FactorPair

# Limits of the product that AUTOMATIC1111 forms in float16, which ends at 65504, before it scales it.
_PRODUCT: Final = 2.0**15
_LARGEST_PRODUCT: Final = 6e4

_SIDES: Final[tuple[Literal["up", "down"], ...]] = ("up", "down", "up")


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
    bases: tuple[Tensor, Tensor]  # (m, p), (n, q)
    metric: LayerMetric  # of the layer
    multipliers: Tensor  # (d, R)

    @property
    def transposed(self) -> RefitTarget:
        """The target of the transposed layer."""
        return RefitTarget(
            self.slices.mT, (self.bases[1], self.bases[0]), self.metric.transposed, self.multipliers
        )


def refit(
    target: RefitTarget,
    layer: Layer,
    stored: Sequence[FactorPair],  # per block, in float8
    alphas: Sequence[float | None],
    check: Callable[[], None] = lambda: None,
) -> list[FactorPair]:
    """Fits ups, downs, and ups again to the other side as it is stored, and rounds each.

    Blocks that partly cancel each other have far more energy than their sum, and all of it is
    rounded. A fit to the rounded side removes some of that error, and lets the blocks cancel
    less. Where a fit leaves the range of the type, the blocks stay as they were before it.

    Args:
        target: the slices that the blocks approximate.
        layer: whose blocks they are.
        stored: the blocks in float8.
        alphas: of the blocks' files.
        check: called before every fit; may raise, to stop.
    """
    pairs = list(stored)
    for side in _SIDES:
        check()
        applied = [as_hosts_apply(*pair, alpha) for pair, alpha in zip(pairs, alphas, strict=True)]
        fitted = list(zip(_fitted(target, applied, side), alphas, strict=True))
        if not all(_is_in_range(pair, alpha) for pair, alpha in fitted):
            break
        pairs = [stored_factors(layer, *pair, alpha, FLOAT8) for pair, alpha in fitted]
    return pairs


def _fitted(
    target: RefitTarget, applied: Sequence[FactorPair], side: Literal["up", "down"]
) -> list[FactorPair]:
    if side == "up":
        ups = _best_ups(target, applied)
        return [(up, down) for up, (_, down) in zip(ups, applied, strict=True)]
    downs = _best_ups(target.transposed, [(down.mT, up.mT) for up, down in applied])
    return [(up, down.mT) for down, (up, _) in zip(downs, applied, strict=True)]


def _best_ups(
    target: RefitTarget, applied: Sequence[FactorPair]
) -> Sequence[Tensor]:  # R times (m, r)
    """Returns the least-squares ups for these downs, including the downs' parts outside the bases.

    What the metric does along the rows' index changes nothing: ups of any form are at hand.
    """
    left, right = target.bases
    ranks = tuple(up.shape[1] for up, _ in applied)
    ups = torch.cat([up for up, _ in applied], 1)
    downs = torch.cat([down for _, down in applied])
    stretch = target.metric.right
    dual = stretch.apply(stretch.apply(downs.mT))  # for inner products with slices
    factors = Factors(block_columns(left, ups)[None], block_columns(right, dual).mT[None])
    batch = Batch(target.slices[None], ranks, (0,))
    fitted = update_ups(batch, factors, target.multipliers, inner=(downs @ dual)[None])
    return torch.split(left @ fitted.up[0], list(ranks), 1)


def _is_in_range(pair: FactorPair, alpha: float | None) -> bool:
    up, down = pair
    rank = up.shape[1]
    if not rank or alpha is None:
        return True
    peak = max(float(up.abs().amax()), float(down.abs().amax()))
    entries_fit = peak * math.sqrt(rank / alpha) <= torch.finfo(FLOAT8).max
    return entries_fit and largest_value(up, down) * rank / alpha <= _LARGEST_PRODUCT
