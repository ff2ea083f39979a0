"""Greedy deflation: block after block, each fitted to what the ones before it left over.

The method of tfernd/hyper-merge, kept as one start of the joint solver and as the baseline of every
comparison. Unlike the original, each block starts from the leading eigenvector of what is left:
multipliers of 1 are a zero direction, for deviations from the mean sum to zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyper_merge.decomposition.ll1 import (
    Batch,
    Factors,
    Solution,
    Statistics,
    Stopping,
    factors_from,
    fit_multipliers,
    statistics,
)


def solve_greedy(
    batches: Sequence[Batch],
    energy: float,
    generator: torch.Generator,
    stopping: Stopping,
) -> Solution:
    """All blocks by deflation: multipliers and one truncated SVD in turn, then the next block.

    Args:
        batches: the layers.
        energy: sum of squares of all slices, in and outside of the cores.
        generator: for the truncated SVDs.
        stopping: `sweeps` is the number of turns for each block.

    Returns:
        The blocks, and the loss after each of them.
    """
    residuals = [batch.slices.clone() for batch in batches]
    columns, parts, losses = [], [], []
    left = energy
    for r in range(len(batches[0].ranks)):
        single = [
            Batch(slices, (batch.ranks[r],), batch.layers)
            for slices, batch in zip(residuals, batches, strict=True)
        ]
        factors, column, loss = _one_block(single, left, generator, stopping)
        for slices, pair in zip(residuals, factors, strict=True):
            _deflate_(slices, pair, column)
        left = loss * left
        columns.append(column)
        parts.append(factors)
        losses.append(left / energy if energy > 0 else 0.0)
        stopping.on_sweep(losses[-1])
    return Solution(_side_by_side(parts), torch.cat(columns, 1), tuple(losses))


def leading_multipliers(batches: Sequence[Batch]) -> Tensor:  # (k, k), float64
    """Eigenvectors of the slices' k x k Gram matrix over all layers, largest first, as columns."""
    flats = (batch.slices.flatten(2) for batch in batches)
    gram = torch.stack([(flat @ flat.mT).double().sum(0).cpu() for flat in flats]).sum(0)
    return torch.linalg.eigh(gram)[1].flip(1)


def _one_block(
    batches: Sequence[Batch],
    energy: float,
    generator: torch.Generator,
    stopping: Stopping,
) -> tuple[tuple[Factors, ...], Tensor, float]:  # factors, (k, 1), fraction left over
    multipliers = leading_multipliers(batches)[:, :1]
    before = float("inf")
    for _ in range(stopping.sweeps):
        factors = factors_from(batches, multipliers, generator)
        found: Statistics = statistics(batches, factors, energy)
        multipliers = fit_multipliers(found)
        loss = found.loss(multipliers)
        if before - loss <= stopping.tolerance * before:
            break
        before = loss
    return factors, multipliers, loss


def _deflate_(
    slices: Tensor,  # (b, k, p, q), changed in place
    factors: Factors,
    column: Tensor,  # (k, 1)
) -> None:
    block = factors.up @ factors.down
    for c, multiplier in enumerate(column.flatten().tolist()):
        slices[:, c].sub_(block, alpha=multiplier)


def _side_by_side(parts: Sequence[tuple[Factors, ...]]) -> tuple[Factors, ...]:
    return tuple(
        Factors(torch.cat([f.up for f in batch], 2), torch.cat([f.down for f in batch], 1))
        for batch in zip(*parts, strict=True)
    )
