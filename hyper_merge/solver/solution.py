"""Puts the groups of a solve together: blocks between the layers' bases, without the metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from hyper_merge.decomposition.ll1 import split_blocks
from hyper_merge.decomposition.problem import Batch, Factors
from hyper_merge.runtime.parallel import ParallelMap
from hyper_merge.solver.metric import Metric
from hyper_merge.solver.products import FactorPair, keep_pairs
from hyper_merge.solver.rank_pruning import GroupSolution, joined_losses


@dataclass(frozen=True, eq=False)
class LowRankSolution:
    """Blocks between the bases, and the multipliers that they were fitted with."""

    factors: dict[int, list[FactorPair]]  # by layer: per block (p, r), (r, q)
    multipliers: Mapping[str, Tensor]  # by group of layers: (k, R), float64
    losses: tuple[float, ...]  # after each sweep (greedy: block), fractions of all energy


def join_groups(
    metric: Metric, groups: list[GroupSolution], parallel: ParallelMap
) -> LowRankSolution:
    """Returns the solution of all groups.

    Args:
        metric: of the loss, in whose coordinates the groups are.
        groups: of all layers; the list is empty afterwards, for their factors go with them.
        parallel: a map over the batches.
    """
    without_metric = partial(_without_metric, metric)
    losses = joined_losses(groups)
    factors: dict[int, list[FactorPair]] = {}
    multipliers: dict[str, Tensor] = {}
    while groups:
        group, given = groups.pop(0).without_factors()
        multipliers[group.name] = metric.to_deviations @ group.multipliers
        for of_batch in parallel(without_metric, group.problem.batches, given):
            factors |= of_batch
    return LowRankSolution(factors, multipliers, losses)


def _without_metric(metric: Metric, batch: Batch, factors: Factors) -> dict[int, list[FactorPair]]:
    """Returns the blocks of every layer of a batch between its bases."""
    pairs = list(split_blocks(batch, factors))
    shape = (factors.up.shape[1], factors.down.shape[2])
    keep, by_layer = metric.analysis.scratch.keep, {}
    for place, index in enumerate(batch.layers):
        between = metric.between(index, shape)
        undone = [between.undo(up[place], down[place]) for up, down in pairs]
        by_layer[index] = keep_pairs(keep, undone)
    return by_layer
