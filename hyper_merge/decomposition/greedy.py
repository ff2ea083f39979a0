"""Solves by greedy deflation: one block after another is fitted to the rest that the others leave.

The method of tfernd/hyper-merge, kept as one start of the joint solver and as the baseline of every
comparison. Unlike the original, each block starts from the leading eigenvector of what is left:
multipliers of 1 are a zero direction, for deviations from the mean sum to zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from hyper_merge.decomposition.ll1 import (
    Solution,
    StoppingCriterion,
    compute_statistics,
    fit_multipliers,
    initial_factors,
)
from hyper_merge.decomposition.problem import Batch, Factors, Problem


def solve_greedy(
    problem: Problem,
    generator: torch.Generator,
    stopping: StoppingCriterion,
) -> Solution:
    """Solves by deflation: multipliers and one truncated SVD in turn, then the next block.

    Args:
        problem: the layers.
        generator: for the truncated SVDs.
        stopping: `sweeps` is the number of turns for each block.

    Returns:
        The blocks, and the loss after each of them.
    """
    left_over = list(problem.parallel(_copied, problem.batches))
    columns, parts, losses = [], [], [1.0]
    for r in range(problem.shape[1]):
        batches = tuple(
            Batch(slices, (batch.ranks[r],), batch.layers)
            for slices, batch in zip(left_over, problem.batches, strict=True)
        )
        single = Problem(batches, losses[-1] * problem.energy, problem.parallel)
        factors, column, fraction = _one_block(single, generator, stopping)
        list(problem.parallel(partial(_deflate_, column), left_over, factors))
        columns.append(column)
        parts.append(factors)
        losses.append(losses[-1] * fraction)
        stopping.on_sweep(losses[-1])
    return Solution(_side_by_side(parts), torch.cat(columns, 1), tuple(losses[1:]))


def leading_multipliers(problem: Problem) -> Tensor:  # (k, k), float64
    """Returns eigenvectors of the slices' k x k Gram matrix as columns, largest first."""
    gram = torch.stack(list(problem.parallel(_gram, problem.batches))).sum(0)
    return torch.linalg.eigh(gram)[1].flip(1)


def _copied(batch: Batch) -> Tensor:
    return batch.slices.clone()


def _gram(batch: Batch) -> Tensor:  # (k, k), float64
    flat = batch.slices.flatten(2)
    return (flat @ flat.mT).double().sum(0).cpu()


def _one_block(
    problem: Problem,
    generator: torch.Generator,
    stopping: StoppingCriterion,
) -> tuple[tuple[Factors, ...], Tensor, float]:  # factors, (k, 1), fraction left over
    multipliers = leading_multipliers(problem)[:, :1]
    losses = [float("inf")]
    for _ in range(stopping.sweeps):
        turn = initial_factors(problem, multipliers, generator)
        statistics = compute_statistics(problem, turn)
        fitted = fit_multipliers(statistics)
        losses.append(statistics.loss(fitted))
        if losses[-1] <= losses[-2]:  # subspace iteration is inexact: a turn may do harm
            factors, multipliers = turn, fitted
        if losses[-2] - losses[-1] <= stopping.tolerance * losses[-1]:
            break
    return factors, multipliers, min(losses)


def _deflate_(
    column: Tensor,  # (k, 1)
    slices: Tensor,  # (b, k, p, q), changed in place
    factors: Factors,
) -> None:
    block = factors.up @ factors.down
    for c, multiplier in enumerate(column.flatten().tolist()):
        slices[:, c].sub_(block, alpha=multiplier)


def _side_by_side(parts: Sequence[tuple[Factors, ...]]) -> tuple[Factors, ...]:
    return tuple(
        Factors(torch.cat([f.up for f in batch], 2), torch.cat([f.down for f in batch], 1))
        for batch in zip(*parts, strict=True)
    )
