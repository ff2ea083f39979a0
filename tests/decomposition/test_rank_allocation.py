"""Bytes go to the layers and blocks where they explain most, and never beyond the budget."""

import heapq
from itertools import product

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hyper_merge.decomposition import rank_allocation
from hyper_merge.decomposition.rank_allocation import (
    deal_ranks,
    even_ranks,
    kept_ranks,
    maximize_gain,
    overcomplete_ranks,
    ranks_within,
    spread_ranks,
    spread_to_fit,
)

AMOUNTS = st.integers(0, 40)
COSTS = st.integers(1, 6)


@st.composite
def shops(draw, lists=4, items=4):
    """Falling gains per list, the cost of an item of each, and a budget."""
    count = draw(st.integers(1, lists))
    gains = [draw(st.lists(AMOUNTS, max_size=items)) for _ in range(count)]
    costs = [draw(COSTS) for _ in range(count)]
    gains = [torch.tensor(sorted(values, reverse=True), dtype=torch.float64) for values in gains]
    return gains, costs, draw(st.integers(0, 60))


def value(gains, counts):
    return sum(float(values[:count].sum()) for values, count in zip(gains, counts, strict=True))


def price(costs, counts):
    return sum(cost * count for cost, count in zip(costs, counts, strict=True))


def best(gains, costs, budget):
    """Returns the best of all choices, by trying each."""
    choices = product(*(range(len(values) + 1) for values in gains))
    return max(value(gains, c) for c in choices if price(costs, c) <= budget)


def bought_one_by_one(gains, costs, budget):
    """Buys with a plain heap: the dearest gain per cost next; a list that is too dear closes."""
    taken = [0] * len(gains)
    heap = [
        (-float(values[0]) / cost, index)
        for index, (values, cost) in enumerate(zip(gains, costs, strict=True))
        if len(values)
    ]
    heapq.heapify(heap)
    while heap:
        rate, index = heapq.heappop(heap)
        if rate == 0 or costs[index] > budget:
            continue
        budget -= costs[index]
        taken[index] += 1
        if taken[index] < len(gains[index]):
            heapq.heappush(heap, (-float(gains[index][taken[index]]) / costs[index], index))
    return taken


@settings(deadline=None, max_examples=200)
@given(shops())
def test_items_are_bought_as_from_a_heap(shop):
    assert spread_ranks(*shop) == bought_one_by_one(*shop)


@settings(deadline=None, max_examples=100)
@given(shops(lists=3, items=3))
def test_spread_ranks_are_one_item_from_the_best(shop):
    gains, costs, budget = shop
    counts = spread_ranks(gains, costs, budget)
    assert price(costs, counts) <= budget
    dearest = max((float(values.max()) for values in gains if len(values)), default=0.0)
    exact = best(gains, costs, budget)
    assert exact - dearest <= value(gains, counts) <= exact
    assert exact <= maximize_gain(gains, costs, budget) + 1e-9


@settings(deadline=None, max_examples=100)
@given(shops(), st.integers(1, 6))
def test_of_items_of_one_cost_the_best_are_bought(shop, cost):
    gains, _, budget = shop
    costs = [cost] * len(gains)
    largest = torch.cat(gains).sort(descending=True).values[: budget // cost]
    assert value(gains, spread_ranks(gains, costs, budget)) == pytest.approx(float(largest.sum()))


@settings(deadline=None, max_examples=100)
@given(shops())
def test_a_full_budget_is_spent_to_the_last_byte(shop):
    gains, costs, budget = shop
    counts = spread_ranks(gains, costs, budget)
    spent = price(costs, counts)
    same = spread_ranks(gains, costs, spent)
    # Up to a list that was closed the order is by gain per cost, so nothing beats it at its cost.
    assume(same == counts == bought_in_order(gains, costs, spent))
    assert value(gains, counts) == pytest.approx(maximize_gain(gains, costs, spent))


def bought_in_order(gains, costs, budget):
    """Stops at the first item that is too dear."""
    rates = sorted(
        (-float(gain) / cost, index)
        for index, (values, cost) in enumerate(zip(gains, costs, strict=True))
        for gain in values
        if gain > 0
    )
    taken = [0] * len(gains)
    for _, index in rates:
        if costs[index] > budget:
            break
        budget -= costs[index]
        taken[index] += 1
    return taken


@settings(deadline=None, max_examples=100)
@given(shops())
def test_no_affordable_item_is_left_unbought(shop):
    gains, costs, budget = shop
    counts = spread_ranks(gains, costs, budget)
    left = budget - price(costs, counts)
    for values, cost, count in zip(gains, costs, counts, strict=True):
        assert count == len(values) or float(values[count]) == 0 or cost > left


def test_the_remaining_budget_goes_to_the_first_cheaper_item():
    gains = [torch.tensor([9.0, 9.0]), torch.tensor([2.0, 1.0])]
    assert spread_ranks(gains, [3, 1], 4) == [1, 1]
    assert spread_ranks(gains, [3, 1], 5) == [1, 2]
    assert spread_ranks(gains, [3, 1], 6) == [2, 0]


def test_nothing_to_buy_costs_nothing():
    none = torch.zeros(0)
    assert spread_ranks([none, none], [1, 2], 9) == [0, 0]
    assert spread_ranks([torch.zeros(3)], [1], 9) == [0]
    assert spread_ranks([torch.ones(3)], [4], 3) == [0]
    assert spread_ranks([], [], 9) == []
    assert maximize_gain([none], [1], 9) == 0


def test_the_bound_takes_the_last_item_in_part():
    gains = [torch.tensor([6.0, 2.0]), torch.tensor([4.0])]
    assert maximize_gain(gains, [2, 4], 4) == pytest.approx(8)
    assert maximize_gain(gains, [2, 4], 5) == pytest.approx(9)
    assert maximize_gain(gains, [2, 4], 3) == pytest.approx(7)
    assert maximize_gain(gains, [2, 4], 99) == pytest.approx(12)


@given(st.integers(0, 500), st.lists(st.integers(1, 200), min_size=1, max_size=6))
def test_a_number_is_dealt_whole_and_in_proportion(total, shares):
    parts = deal_ranks(total, shares)
    assert sum(parts) == total
    for part, share in zip(parts, shares, strict=True):
        assert abs(part - total * share / sum(shares)) < 1 + 1e-9


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6))
def test_the_list_itself_is_dealt_as_it_is(ranks):
    assert deal_ranks(sum(ranks), ranks) == tuple(ranks)
    assert deal_ranks(1, ranks) == (1, *[0] * (len(ranks) - 1))


def planted(*sizes):
    """Gains of layers that have as many equal components and nothing more."""
    return [torch.tensor([4.0] * size + [0.0] * (8 - size)) for size in sizes]


def test_layers_of_known_ranks_get_exactly_these():
    ranks = overcomplete_ranks(planted(1, 5, 0), [10, 20, 5], [8, 8, 8], [4], 1000)
    assert ranks == [(1,), (5,), (0,)]


def test_few_bytes_go_to_the_best_gains():
    gains = [torch.tensor([8.0, 6.0, 1.0]), torch.tensor([9.0, 2.0])]
    # Per byte 4, 3, 1/2 and 9/4, 1/2: in the order first, first, second.
    assert overcomplete_ranks(gains, [2, 4], [8, 8], [1], 4) == [(2,), (0,)]
    assert overcomplete_ranks(gains, [2, 4], [8, 8], [1], 8) == [(2,), (1,)]


def test_a_layers_ranks_are_split_like_the_list():
    (ranks,) = overcomplete_ranks([torch.ones(12)], [1], [6], [2, 1, 1], 12)
    assert ranks == (6, 3, 3)
    # Twice a block's limit in all, and no block above it.
    (ranks,) = overcomplete_ranks([torch.ones(12)], [1], [4], [2, 1, 1], 12)
    assert ranks == (4, 2, 2)


def with_entries(gains, costs, entries):
    """Returns a function that tells what items cost, with entries that grow in steps of 8 as headers do."""

    def size_of(counts):
        opened = sum(e for e, count in zip(entries, counts, strict=True) if count)
        return price(costs, counts) - (-opened // 8) * 8

    return size_of


@example(
    ([torch.tensor([1.0]).double(), torch.tensor([2.0, 2.0]).double()], [1, 4], 13), [2, 1, 0]
)  # the entry fits into what rounding up leaves
@settings(deadline=None, max_examples=200)
@given(shops(lists=3, items=3), st.lists(AMOUNTS, min_size=3, max_size=3))
def test_no_item_more_fits_where_costs_do_not_add_up(shop, entries):
    gains, costs, budget = shop
    entries = entries[: len(gains)]
    size_of = with_entries(gains, costs, entries)
    least = [max(entry - 7, 0) for entry in entries]
    counts = spread_to_fit(gains, costs, least, budget, size_of)
    assert size_of(counts) <= budget
    for index, values in enumerate(gains):
        more = [count + (place == index) for place, count in enumerate(counts)]
        useful = counts[index] < len(values) and float(values[counts[index]]) > 0
        assert not useful or size_of(more) > budget


@settings(deadline=None, max_examples=100)
@given(shops())
def test_costs_that_add_up_are_spent_alike(shop):
    gains, costs, budget = shop
    nothing = [0] * len(gains)
    fitted = spread_to_fit(gains, costs, nothing, budget, lambda counts: price(costs, counts))
    assert fitted == spread_ranks(gains, costs, budget)


def test_lists_that_are_dear_to_open_wait():
    gains = [torch.tensor([5.0, 5.0, 5.0]), torch.tensor([8.0])]
    assert spread_ranks(gains, [1, 1], 4, [0, 9]) == [3, 0]
    assert spread_ranks(gains, [1, 1], 13, [0, 9]) == [3, 1]
    together = [torch.tensor([5.0, 5.0, 5.0]), torch.tensor([3.0])]  # 15 for 6, 3 for 2
    assert spread_ranks(together, [1, 2], 6, [3, 0]) == [3, 0]


def kept(energies, costs, budget):
    """Returns the ranks that are kept where only factors cost."""

    def size_of(ranks):
        return price(costs, map(sum, ranks))

    return kept_ranks(energies, costs, [0] * len(costs), budget, size_of)


def test_the_components_of_most_energy_per_byte_are_kept():
    energies = [
        [torch.tensor([8.0, 1.0]), torch.tensor([6.0])],
        [torch.tensor([9.0, 8.0]), torch.zeros(0)],
    ]
    # Per byte 4, 1/2 | 3 and 9/4, 2.
    assert kept(energies, [2, 4], 4) == [(1, 1), (0, 0)]
    assert kept(energies, [2, 4], 12) == [(1, 1), (2, 0)]
    assert kept(energies, [2, 4], 14) == [(2, 1), (2, 0)]
    assert kept([], [], 14) == []


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_the_bytes_of_even_ranks_are_never_exceeded(ranks, shapes, seed):
    even = even_ranks(ranks, shapes)
    costs = [m + n for m, n in shapes]
    budget = sum(cost * sum(rank) for cost, rank in zip(costs, even, strict=True))
    rng = torch.Generator().manual_seed(seed)
    energies = [
        [torch.rand(min(shape), generator=rng).sort(descending=True).values for _ in ranks]
        for shape in shapes
    ]
    chosen = kept(energies, costs, budget)
    assert price(costs, [sum(rank) for rank in chosen]) <= budget
    # They are kept from the front, and no other components of the same cost hold more.
    best_of_all = maximize_gain(
        [values for layer in energies for values in layer],
        [cost for cost in costs for _ in ranks],
        budget,
    )
    held = sum(
        float(values[:count].double().sum())
        for layer, counts in zip(energies, chosen, strict=True)
        for values, count in zip(layer, counts, strict=True)
    )
    assert_close(torch.tensor(min(held, best_of_all)), torch.tensor(held))


def test_the_fewest_ranks_within_an_error_barely_meet_it():
    spectra = [torch.tensor(values).double() for values in ([8.0, 4, 2, 1], [5.0, 5, 0.5])]
    ranks = ranks_within(spectra, [1, 2], 4.0)
    tails = [float(values[rank:].sum()) for values, rank in zip(spectra, ranks, strict=True)]
    assert sum(tails) <= 4.0
    assert ranks == [2, 2]
    assert ranks_within(spectra, [1, 2], 25.5) == [0, 0]
    assert ranks_within(spectra, [1, 2], 0.0) == [4, 3]


@pytest.mark.parametrize("hidden", [0, 1, 50])
def test_few_sizes_are_asked_for(hidden):
    costs = torch.randint(20, 60, (100_000,), generator=torch.Generator().manual_seed(0)).double()
    price, asked = costs.cumsum(0), []

    def size_of(count):  # beside the costs something that nobody foresees, as headers are
        asked.append(count)
        return int(price[count - 1]) + hidden * count + 12_345

    budget = 2_000_000
    count = rank_allocation._most_that_fit(price, budget, size_of)
    assert len(asked) <= 10  # halving takes 16
    assert size_of(count) <= budget < size_of(count + 1)
