"""Adapts ranks: blocks that were fitted with too many ranks keep their best components."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from hyper_merge.decomposition.ll1 import Solution, split_blocks
from hyper_merge.decomposition.normalization import balance
from hyper_merge.decomposition.problem import Batch, Factors, Keep, Problem
from hyper_merge.runtime.parallel import ParallelMap
from hyper_merge.solver.allowance import Allowance
from hyper_merge.solver.products import FactorPair, keep_pairs

_T = TypeVar("_T")


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

    def without_factors(self) -> tuple[GroupSolution, Iterator[Factors]]:
        """Returns the rest of the group, and an iterator that gives the factors away one by one."""
        return replace(self, factors=()), given_away(deque(self.factors))


def given_away(items: deque[_T]) -> Iterator[_T]:
    """Yields the items, none of which is kept."""
    while items:
        yield items.popleft()


@dataclass(frozen=True, eq=False)
class _BalancedLayer:
    """One layer's blocks, the components of each in falling order."""

    alone: Callable[[tuple[int, ...]], Batch]  # the layer as a batch, from its ranks
    pairs: list[FactorPair]  # per block (p, r), (r, q)


def prune_ranks(
    groups: list[GroupSolution],
    allowance: Allowance,
    parallel: ParallelMap,
    *,
    is_balanced: bool = False,
) -> list[GroupSolution]:
    """Returns the groups with the components of most energy for their bytes, across all groups.

    Args:
        groups: the groups' solutions with too many ranks; empty afterwards, so that they take no
            memory beside the result.
        allowance: the bytes that all of them may take together.
        parallel: a map over the batches.
        is_balanced: whether the blocks' components are singular ones in falling order, each as large in
            its ups as in its downs.
    """
    layers: dict[int, _BalancedLayer] = {}
    energies: dict[int, list[Tensor]] = {}
    rest = []
    while groups:
        group, factors = groups.pop(0).without_factors()
        rest.append(group)
        size = group.multipliers.square().sum(0)
        balanced = _split if is_balanced else partial(_balanced, group.problem.keep)
        batches = group.problem.batches
        for batch, of_layers in zip(batches, parallel(balanced, batches, factors), strict=True):
            for place, (index, pairs) in enumerate(zip(batch.layers, of_layers, strict=True)):
                alone = partial(batch.of_layer, place)
                layers[index] = _BalancedLayer(alone, pairs)
                values = [up.square().sum(0).double() for up, _ in pairs]
                energies[index] = [v.square() * s for v, s in zip(values, size, strict=True)]
    ranks = allowance.keep(energies)
    return [_pruned_group(group, layers, ranks, parallel) for group in rest]


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


def _balanced(keep: Keep, batch: Batch, factors: Factors) -> list[list[FactorPair]]:
    """Returns every layer's blocks with their components in falling order.

    Each side has the roots of the values. On the CPU: a GPU takes as long for one small SVD as for a
    whole sweep over a layer.
    """
    factors = Factors(factors.up.cpu(), factors.down.cpu())
    pairs = [balance(*pair) if pair[0].shape[2] else pair for pair in split_blocks(batch, factors)]
    return [keep_pairs(keep, layer) for layer in _by_layer(batch, pairs)]


def _split(batch: Batch, factors: Factors) -> list[list[FactorPair]]:
    """Returns every layer's blocks."""
    return _by_layer(batch, list(split_blocks(batch, factors)))


def _by_layer(
    batch: Batch,
    pairs: Sequence[FactorPair],  # per block (b, p, r), (b, r, q)
) -> list[list[FactorPair]]:
    return [[(up[i], down[i]) for up, down in pairs] for i in range(len(batch.layers))]


def _pruned_group(
    group: GroupSolution,
    layers: dict[int, _BalancedLayer],  # those of the group are taken out
    ranks: Mapping[int, tuple[int, ...]],
    parallel: ParallelMap,
) -> GroupSolution:
    indices = [index for batch in group.problem.batches for index in batch.layers]
    chosen = [index for index in indices if sum(ranks[index])]
    for index in set(indices).difference(chosen):
        del layers[index]
    batches = tuple(layers[index].alone(ranks[index]) for index in chosen)
    pairs = (layers.pop(index).pairs for index in chosen)
    cut = partial(_cut, group.problem.keep)
    devices, kept = [batch.device for batch in batches], [ranks[index] for index in chosen]
    factors = tuple(parallel(cut, pairs, kept, devices))
    problem = replace(group.problem, batches=batches)
    return GroupSolution(group.name, problem, group.multipliers, factors, ())


def _cut(
    keep: Keep, pairs: Sequence[FactorPair], ranks: Sequence[int], device: torch.device
) -> Factors:
    """Returns the first components of each block, side by side."""
    up = torch.cat([up[:, :rank] for (up, _), rank in zip(pairs, ranks, strict=True)], 1)
    down = torch.cat([down[:rank] for (_, down), rank in zip(pairs, ranks, strict=True)])
    return Factors(up[None].to(device), down[None].to(device)).kept(keep)
