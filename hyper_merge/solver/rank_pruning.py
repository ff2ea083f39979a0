"""Adaptive ranks: blocks that were found with too many keep their best components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyper_merge.decomposition.ll1 import Batch, Factors, Problem, split_blocks
from hyper_merge.decomposition.normalization import balance
from hyper_merge.decomposition.rank_allocation import kept_ranks
from hyper_merge.runtime.parallel import ParallelMap


@dataclass(frozen=True)
class Allowance:
    """What ranks may take: bytes."""

    costs: tuple[int, ...]  # of a rank, per layer
    budget: int


@dataclass(frozen=True, eq=False)
class GroupSolution:
    """The layers that share multipliers, as far as they are solved."""

    name: str
    problem: Problem
    multipliers: Tensor  # (d, R), in the weighting's coordinates
    factors: tuple[Factors, ...]  # one per batch
    losses: tuple[float, ...]


def prune_ranks(
    groups: Sequence[GroupSolution], allowance: Allowance, each: ParallelMap
) -> list[GroupSolution]:
    """The same with the components of most energy for their bytes, in all groups together.

    Args:
        groups: as far as they are solved.
        allowance: what all of them may take.
        each: a map over the batches.
    """
    found: dict[int, tuple[Batch, int, list[tuple[Tensor, Tensor]]]] = {}
    energies: dict[int, list[Tensor]] = {}
    for group in groups:
        size = group.multipliers.square().sum(0)
        places = zip(group.problem.batches, group.factors, strict=True)
        for batch, pairs in each(_in_order, *zip(*places, strict=True)):
            for place, index in enumerate(batch.layers):
                own = [(up[place], down[place]) for up, down in pairs]
                found[index] = batch, place, own
                values = [up.square().sum(0).double().cpu() for up, _ in own]
                energies[index] = [v.square() * s for v, s in zip(values, size, strict=True)]
    order = sorted(found)
    kept = kept_ranks(
        [energies[index] for index in order],
        [allowance.costs[index] for index in order],
        allowance.budget,
    )
    ranks = dict(zip(order, kept, strict=True))
    return [_kept(group, found, ranks) for group in groups]


def _in_order(batch: Batch, factors: Factors) -> tuple[Batch, list[tuple[Tensor, Tensor]]]:
    """The blocks with the components of each in falling order, roots of their values on each side."""
    return batch, [
        balance(*pair) if pair[0].shape[2] else pair for pair in split_blocks(batch, factors)
    ]


def _kept(
    group: GroupSolution,
    found: Mapping[int, tuple[Batch, int, list[tuple[Tensor, Tensor]]]],
    ranks: Mapping[int, tuple[int, ...]],
) -> GroupSolution:
    batches, factors = [], []
    for before in group.problem.batches:
        for index in before.layers:
            if not sum(ranks[index]):
                continue
            batch, place, pairs = found[index]
            cut = list(zip(pairs, ranks[index], strict=True))
            up = torch.cat([up[:, :rank] for (up, _), rank in cut], 1)
            down = torch.cat([down[:rank] for (_, down), rank in cut])
            batches.append(Batch(batch.slices[place][None], ranks[index], (index,)))
            factors.append(Factors(up[None], down[None]))
    problem = replace(group.problem, batches=tuple(batches))
    return GroupSolution(group.name, problem, group.multipliers, tuple(factors), ())
