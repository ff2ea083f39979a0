"""Adapts ranks: blocks that were fitted with too many ranks keep their best components."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyper_merge.decomposition.ll1 import Solution, split_blocks
from hyper_merge.decomposition.normalization import balance
from hyper_merge.decomposition.problem import Batch, Factors, Problem
from hyper_merge.runtime.parallel import ParallelMap
from hyper_merge.solver.allowance import Allowance


@dataclass(frozen=True, eq=False)
class GroupSolution:
    """The solution for layers that share multipliers, complete or at an intermediate stage."""

    name: str
    problem: Problem
    multipliers: Tensor  # (d, R), in the coordinates of the metric
    factors: tuple[Factors, ...]  # one per batch
    losses: tuple[float, ...]

    @classmethod
    def of(cls, name: str, problem: Problem, solution: Solution) -> GroupSolution:
        """Returns a group with the solution of its problem."""
        return cls(name, problem, solution.multipliers, solution.factors, solution.losses)


@dataclass(frozen=True, eq=False)
class _BalancedLayer:
    """One layer's blocks, the components of each in falling order."""

    source: Tensor | Callable[[], Tensor]  # of the slices (1, d, p, q)
    device: torch.device  # of the slices
    pairs: list[tuple[Tensor, Tensor]]  # per block (p, r), (r, q)


def prune_ranks(
    groups: Sequence[GroupSolution], allowance: Allowance, parallel: ParallelMap
) -> list[GroupSolution]:
    """Returns the groups with the components of most energy for their bytes, across all groups.

    Args:
        groups: the groups' solutions with too many ranks.
        allowance: the bytes that all of them may take together.
        parallel: a map over the batches.
    """
    layers: dict[int, _BalancedLayer] = {}
    energies: dict[int, list[Tensor]] = {}
    for group in groups:
        size = group.multipliers.square().sum(0)
        batches = zip(group.problem.batches, group.factors, strict=True)
        for batch, pairs in parallel(_balanced, *zip(*batches, strict=True)):
            for place, index in enumerate(batch.layers):
                layer_pairs = [(up[place], down[place]) for up, down in pairs]
                layers[index] = _BalancedLayer(_source_of(batch, place), batch.device, layer_pairs)
                values = [up.square().sum(0).double() for up, _ in layer_pairs]
                energies[index] = [v.square() * s for v, s in zip(values, size, strict=True)]
    ranks = allowance.keep(energies)
    return [_pruned_group(group, layers, ranks) for group in groups]


def joined_losses(groups: Sequence[GroupSolution]) -> tuple[float, ...]:
    """Returns losses of all groups together; a group that ends earlier keeps its last loss."""
    total = sum(group.problem.energy for group in groups) or 1.0
    length = max(len(group.losses) for group in groups)
    return tuple(
        sum(
            group.problem.energy * group.losses[min(place, len(group.losses) - 1)]
            for group in groups
            if group.losses
        )
        / total
        for place in range(length)
    )


def _balanced(batch: Batch, factors: Factors) -> tuple[Batch, list[tuple[Tensor, Tensor]]]:
    """Returns the blocks with their components in falling order, roots of values on each side.

    On the CPU: a GPU takes as long for one small SVD as for a whole sweep over a layer.
    """
    factors = Factors(factors.up.cpu(), factors.down.cpu())
    return batch, [
        balance(*pair) if pair[0].shape[2] else pair for pair in split_blocks(batch, factors)
    ]


def _source_of(batch: Batch, place: int) -> Tensor | Callable[[], Tensor]:
    """Returns the source of one layer's slices (1, d, p, q)."""
    if isinstance(batch.source, Tensor):
        return batch.source[place][None]
    return batch.source if len(batch.layers) == 1 else lambda: batch.slices[place][None]


def _pruned_group(
    group: GroupSolution,
    layers: Mapping[int, _BalancedLayer],
    ranks: Mapping[int, tuple[int, ...]],
) -> GroupSolution:
    batches, factors = [], []
    for before in group.problem.batches:
        for index in before.layers:
            if not sum(ranks[index]):
                continue
            layer = layers[index]
            cut = list(zip(layer.pairs, ranks[index], strict=True))
            up = torch.cat([up[:, :rank] for (up, _), rank in cut], 1)
            down = torch.cat([down[:rank] for (_, down), rank in cut])
            batches.append(Batch(layer.source, ranks[index], (index,)))
            factors.append(Factors(up[None].to(layer.device), down[None].to(layer.device)))
    problem = replace(group.problem, batches=tuple(batches))
    return GroupSolution(group.name, problem, group.multipliers, tuple(factors), ())
