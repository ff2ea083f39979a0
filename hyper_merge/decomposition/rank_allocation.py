"""Turns the ranks that the user chooses into ranks of each block in each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from hyper_merge.errors import RankError

_MOST = 2.0  # times a block's limit: a sweep over more columns costs much and gains little
_GUESSES = 6  # of a size, before the rest is halved


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
    entries: Sequence[float] = (),  # what the first item of each list costs in addition
) -> list[int]:
    """Returns how many items of each list to buy: those of most gain for their cost come first.

    What is left when the next item is too dear goes to the first cheaper ones. As the gains of a
    list fall, its first items are always taken before the later ones; up to the last few items this
    is the best choice that there is.
    """
    entries = entries or [0.0] * len(gains)
    ranking = _rank_items(gains, costs, entries)
    affordable = int((ranking.price.cumsum(0) <= budget).sum())
    taken = torch.bincount(ranking.owner[:affordable], minlength=len(gains)).tolist()
    left = budget - float(ranking.price[:affordable].sum())

    def price(index: int) -> float:
        return costs[index] + (0.0 if taken[index] else entries[index])

    closed: set[int] = set()
    cheapest = min(costs, default=0.0)
    for index in ranking.owner[affordable:].tolist():
        if left < cheapest:
            break
        if index in closed:
            continue
        if price(index) <= left:
            left -= price(index)
            taken[index] += 1
        else:
            closed.add(index)
    return taken


def spread_to_fit(
    gains: Sequence[Tensor],  # (any,) each, falling
    costs: Sequence[int],  # the least that one item of each list costs
    entries: Sequence[int],  # the least that the first item of each list costs in addition
    budget: int,
    size_of: Callable[[Sequence[int]], int],
) -> list[int]:
    """Returns what `spread_ranks` does where costs do not simply add up: no item more fits.

    Args:
        gains: of the items, by list.
        costs: of one item of each list, without what it may cause elsewhere.
        entries: of each list's first item, in addition.
        budget: what all may cost together.
        size_of: tells what numbers of items of every list cost, at least the sum of their costs.
    """
    ranking = _rank_items(gains, costs, entries)

    def first(count: int) -> list[int]:
        return torch.bincount(ranking.owner[:count], minlength=len(gains)).tolist()

    low = _most_that_fit(ranking.price.cumsum(0), budget, lambda count: size_of(first(count)))
    taken = first(low)
    size = size_of(taken)
    closed: set[int] = set()
    cheapest = min(costs, default=0)
    for index in ranking.owner[low:].tolist():
        if size + cheapest > budget:
            break
        if index in closed:
            continue
        taken[index] += 1
        least = size + costs[index] + (entries[index] if taken[index] == 1 else 0)
        larger = size_of(taken) if least <= budget else budget + 1
        if larger <= budget:
            size = larger
        else:
            taken[index] -= 1
            closed.add(index)
    return taken


def _most_that_fit(
    price: Tensor,  # (items,), float64: the least that so many of the first items cost
    budget: int,
    size_of: Callable[[int], int],
) -> int:
    """Returns how many of the first items fit.

    What one guess costs beside its price tells the next: the search takes few sizes, for each takes long
    where files are many.
    """
    low, high = 0, int((price <= budget).sum())
    count, guesses = high, 0
    while low < high:
        size = size_of(count)
        low, high = (count, high) if size <= budget else (low, count - 1)
        guesses += 1
        in_proportion = float(price[count - 1]) * budget / size
        guess = int((price <= in_proportion).sum())
        count = guess if guesses < _GUESSES else (low + high + 1) // 2
        count = min(max(count, low + 1), high)
    return low


class _Ranking(NamedTuple):
    """The items of all lists, those of most gain for their cost first."""

    owner: Tensor  # of each item: its list
    price: Tensor  # float64, of each item


def _rank_items(
    gains: Sequence[Tensor], costs: Sequence[float], entries: Sequence[float]
) -> _Ranking:
    """Ranks items of any gain, each list's in their order.

    The first items of a list that share the cost of its entry best count as one: they are ranked by
    what they gain together for what they cost together.
    """
    values = [part.double().cpu() for part in gains]
    counts = torch.tensor([len(part) for part in values], dtype=torch.int64)
    owner = torch.arange(len(values)).repeat_interleave(counts)
    price = torch.tensor(costs, dtype=torch.float64)[owner]
    value = torch.cat(values) if values else torch.zeros(0, dtype=torch.float64)
    rate = value / price
    starts = (counts.cumsum(0) - counts).tolist()
    for part, cost, entry, start in zip(values, costs, entries, starts, strict=True):
        if entry and len(part):
            together = part.cumsum(0) / (entry + cost * torch.arange(1, len(part) + 1))
            best = int(together.argmax())
            rate[start : start + best + 1] = together[best]
            price[start] += entry
    ranking = rate.argsort(descending=True, stable=True)
    ranking = ranking[value[ranking] > 0]
    return _Ranking(owner[ranking], price[ranking])


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
    costs: Sequence[int],  # the least that a rank costs, per layer
    entries: Sequence[int],  # the least that a block's first rank costs in addition, per layer
    budget: int,
    size_of: Callable[[Sequence[tuple[int, ...]]], int],
) -> list[tuple[int, ...]]:  # ranks of the R blocks, per layer
    """Returns the ranks of blocks that keep only their components of most energy per cost.

    Args:
        energies: of the blocks' components.
        costs: of one rank.
        entries: of a block's first rank, in addition.
        budget: what all may cost together.
        size_of: tells what ranks per layer and block cost.
    """
    if not energies:
        return []
    blocks = len(energies[0])

    def by_layer(counts: Sequence[int]) -> list[tuple[int, ...]]:
        return [tuple(counts[start : start + blocks]) for start in range(0, len(counts), blocks)]

    return by_layer(
        spread_to_fit(
            [values for layer in energies for values in layer],
            [cost for cost in costs for _ in range(blocks)],
            [entry for entry in entries for _ in range(blocks)],
            budget,
            lambda counts: size_of(by_layer(counts)),
        )
    )


def last_rate(rates: Sequence[Tensor], costs: Sequence[Tensor], budget: float) -> float:
    """Returns the rate of the last item that a budget buys, the best ones first; 0 if it buys all.

    Args:
        rates: what items gain for their costs, in pieces (any,).
        costs: of the same items.
        budget: what all that are bought may cost.
    """
    rate, order = torch.cat(list(rates)).sort(descending=True)
    spent = torch.cat(list(costs))[order].cumsum(0)
    bought = int((spent <= budget).sum())
    return float(rate[bought]) if bought < len(rate) else 0.0
