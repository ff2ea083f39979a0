"""Turns the ranks that the user chooses into ranks of each block in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from hyper_merge.errors import RankError

_MOST = 2.0  # times a block's limit: a sweep over more columns costs much and gains little


def even_ranks(
    ranks: Sequence[int],
    shapes: Sequence[tuple[int, int]],  # (m, n) of every layer
) -> list[tuple[int, ...]]:  # ranks of the R blocks, per layer
    """Returns the same ranks in every layer, capped at what the layer can have.

    Raises:
        RankError: no ranks, or one below 1.
    """
    if not ranks or min(ranks) < 1:
        raise RankError(f"ranks must be 1 or more, at least one of them, got {list(ranks)}")
    return [tuple(min(rank, *shape) for rank in ranks) for shape in shapes]


def spread_ranks(
    gains: Sequence[Tensor],  # (any,) each, falling
    costs: Sequence[float],  # of one item of each list
    budget: float,
) -> list[int]:
    """Returns how many items of each list to buy: those of most gain for their cost come first.

    What is left when the next item is too dear goes to the first cheaper ones. As the gains of a
    list fall, its first items are always taken before the later ones; up to the last few items this
    is the best choice that there is.
    """
    counts = torch.tensor([len(values) for values in gains])
    if not int(counts.sum()):
        return [0] * len(gains)
    owner = torch.arange(len(gains)).repeat_interleave(counts)
    price = torch.tensor(costs, dtype=torch.float64)[owner]
    value = torch.cat([values.double().cpu() for values in gains])
    ranking = (value / price).argsort(descending=True, stable=True)
    ranking = ranking[value[ranking] > 0]
    affordable = int((price[ranking].cumsum(0) <= budget).sum())
    taken = torch.bincount(owner[ranking[:affordable]], minlength=len(gains))
    left = budget - float(price[ranking[:affordable]].sum())
    return _with_the_rest(taken.tolist(), owner[ranking[affordable:]].tolist(), costs, left)


def ranks_within(
    spectra: Sequence[Tensor],  # of every layer (any,): squared singular values, falling
    costs: Sequence[float],  # of one rank in the layer, in any unit
    left: float,
) -> list[int]:
    """Returns the cheapest ranks with which the layers' tails add up to `left` at most.

    It is an approximation: each rank goes where it reduces the error most for its cost.
    """
    counts = torch.tensor([len(values) for values in spectra])
    owner = torch.arange(len(spectra)).repeat_interleave(counts)
    energy = torch.cat([values.double() for values in spectra])
    price = torch.tensor(costs, dtype=torch.float64)[owner]
    ranking = (energy / price).argsort(descending=True, stable=True)
    tails = energy.sum() - torch.cat([energy.new_zeros(1), energy[ranking].cumsum(0)])
    taken = int((tails[:-1] > left).sum())
    return torch.bincount(owner[ranking[:taken]], minlength=len(spectra)).tolist()


def maximize_gain(
    gains: Sequence[Tensor],  # (any,) each, falling
    costs: Sequence[float],  # of one item of each list
    budget: float,
) -> float:
    """Returns a gain that no choice within the budget can exceed: the last item may be divided."""
    counts = torch.tensor([len(values) for values in gains])
    value = torch.cat([values.double().cpu() for values in gains])
    price = torch.tensor(costs, dtype=torch.float64).repeat_interleave(counts)
    ranking = (value / price).argsort(descending=True)
    before = price[ranking].cumsum(0) - price[ranking]
    shares = ((budget - before) / price[ranking]).clamp(0, 1)
    return float((value[ranking] * shares).sum())


def deal_ranks(total: int, shares: Sequence[int]) -> tuple[int, ...]:
    """Divides a whole number in proportion to shares; the first ones get what does not divide.

    >>> deal_ranks(5, [128, 64, 32])
    (3, 2, 0)
    """
    # Rounded up: a layer of rank 1 goes to the first block, which is the largest.
    ends = [-(-total * share // sum(shares)) for share in (0, *accumulate(shares))]
    return tuple(end - start for start, end in pairwise(ends))


def overcomplete_ranks(
    gains: Sequence[Tensor],  # per layer, falling: what a rank more can explain of its deviations
    costs: Sequence[float],  # of a rank, per layer
    limits: Sequence[int],  # of one block's rank, per layer
    ranks: Sequence[int],  # of the list
    budget: float,
) -> list[tuple[int, ...]]:  # ranks of the R blocks, per layer
    """Returns ranks where the spectra promise most, in each layer split as the list is."""
    within = [layer[: int(_MOST * limit)] for layer, limit in zip(gains, limits, strict=True)]
    totals = zip(spread_ranks(within, costs, budget), limits, strict=True)
    return [tuple(min(part, limit) for part in deal_ranks(total, ranks)) for total, limit in totals]


def kept_ranks(
    energies: Sequence[Sequence[Tensor]],  # per layer and block: of its components, falling
    costs: Sequence[float],  # of a rank, per layer
    budget: float,
) -> list[tuple[int, ...]]:  # ranks of the R blocks, per layer
    """Returns the ranks of blocks that keep only their components of most energy per cost."""
    if not energies:
        return []
    blocks = len(energies[0])
    flat = [values for layer in energies for values in layer]
    counts = spread_ranks(flat, [cost for cost in costs for _ in range(blocks)], budget)
    return [tuple(counts[start : start + blocks]) for start in range(0, len(counts), blocks)]


def _with_the_rest(
    taken: list[int], following: Sequence[int], costs: Sequence[float], left: float
) -> list[int]:
    """Buys on, in the lists' order, what still fits; never past an item that does not."""
    cheapest = min(costs)
    closed: set[int] = set()
    for index in following:
        if left < cheapest:
            break
        if index in closed:
            continue
        if costs[index] <= left:
            taken[index] += 1
            left -= costs[index]
        else:
            closed.add(index)
    return taken
