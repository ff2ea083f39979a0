from itertools import product

import pytest
import torch
from dense_oracles import normal, problem_of, random_family, stack_of, tail, truncated
from torch.testing import assert_close

from hyper_merge.decomposition.bounds import (
    best_private_ranks,
    budget_bound,
    compute_spectra,
    even_private_ranks,
    lower_bound,
    private_errors,
)
from hyper_merge.decomposition.contrasts import around_base, around_mean
from hyper_merge.decomposition.greedy import solve_greedy
from hyper_merge.decomposition.initialization import best_start
from hyper_merge.decomposition.ll1 import StoppingCriterion, initial_factors, solve_ll1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bound_of(problem, outside=0.0):
    """The bound of a problem whose slices are all deviations; `outside` in its first layer."""
    layers, energies, ranks, grams = [], [], [], []
    for batch in problem.batches:
        for core in batch.slices:
            layers.append(compute_spectra(core, around_base(len(core)).to_deviations))
            energies.append(float(core.square().sum()))
            ranks.append(batch.ranks)
            grams.append(core.flatten(1) @ core.flatten(1).mT)
    energies[0] += outside
    return lower_bound(layers, energies, ranks, [sum(grams)])


def solved(problem, sweeps=40):
    start = best_start(problem, [], [], seeded(1))
    return solve_ll1(
        problem, initial_factors(problem, start, seeded(2)), start, StoppingCriterion(sweeps, 1e-9)
    )


@pytest.mark.parametrize("shape", [(3, 6, 9), (3, 9, 6), (1, 5, 5)])
def test_spectra_are_dense_squared_singular_values(rng, shape):
    core, contrasts = normal(rng, *shape), around_mean([1.0, 2.0, 1.0, 3.0][: shape[0] + 1])
    spectra = compute_spectra(core, contrasts.to_deviations)
    rows, columns = core.transpose(0, 1).flatten(1), core.flatten(0, 1).mT
    for values, unfolding in ((spectra.rows, rows), (spectra.columns, columns)):
        dense = torch.zeros(len(unfolding), dtype=torch.float64)
        dense[: min(unfolding.shape)] = torch.linalg.svdvals(unfolding).square()
        assert_close(values, dense, rtol=1e-9, atol=1e-9)
    deviations = torch.einsum("kd,dpq->kpq", contrasts.to_deviations, core)
    assert_close(spectra.private, torch.linalg.svdvals(deviations).square(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_no_solution_is_below_the_bound(seed):
    problem = random_family(seed)
    bound = bound_of(problem)
    assert bound > 0
    assert solved(problem).loss >= bound * (1 - 1e-9)
    assert solve_greedy(problem, seeded(), StoppingCriterion(6, 0.0)).loss >= bound * (1 - 1e-9)


@pytest.mark.parametrize("shape", [(2, 1, 10, 8), (2, 1, 8, 10)])
def test_two_checkpoints_attain_the_bound(rng, shape):
    problem = problem_of((normal(rng, *shape), (3, 1)))
    dense = tail(problem.batches[0].slices, 4) / problem.energy
    assert_close(bound_of(problem), dense)
    assert_close(solved(problem, 300).loss, dense, rtol=1e-4, atol=0)


def test_one_full_rank_block_attains_the_checkpoint_bound(rng):
    problem = problem_of((normal(rng, 2, 3, 5, 5), (5,)))
    flat = problem.batches[0].slices.transpose(0, 1).flatten(1)
    assert_close(bound_of(problem), tail(flat, 1) / problem.energy)
    assert_close(solved(problem, 300).loss, bound_of(problem), rtol=1e-6, atol=0)


def test_energy_outside_of_the_bases_raises_the_bound(rng):
    problem = problem_of((normal(rng, 1, 1, 8, 8), (2,)))
    dense = tail(problem.batches[0].slices, 2)
    assert_close(bound_of(problem, 7.0), (dense + 7.0) / (problem.energy + 7.0))


def test_full_ranks_have_a_bound_of_zero(rng):
    assert abs(bound_of(problem_of((normal(rng, 1, 2, 4, 5), (4, 4))))) < 1e-12


def test_the_bound_of_nothing_is_zero():
    core = torch.zeros(2, 4, 4)
    layer = compute_spectra(core, around_mean([1.0] * 3).to_deviations)
    gram = torch.zeros(2, 2, dtype=torch.float64)
    assert lower_bound([layer], [0.0], [(1,)], [gram]) == 0.0
    assert lower_bound([], [], [], [gram]) == 0.0
    assert budget_bound([layer], [0.0], [8.0], 8.0, 1, [gram]) == 0.0


def family(rng, shapes=((9, 8), (6, 10)), k=3):
    """Deviations of k checkpoints per layer, with spectra and energies."""
    contrasts = around_mean([1.0] * k)
    dense = [stack_of(rng, 1, k, *shape, 0.7)[0] for shape in shapes]
    layers = [
        compute_spectra(
            torch.einsum("kd,kpq->dpq", contrasts.to_deviations, part), contrasts.to_deviations
        )
        for part in dense
    ]
    return dense, layers, torch.stack([part.square().sum((1, 2)) for part in dense])


def private_losses(layers, energies, ranks):
    """Returns what private LoRAs of even ranks leave."""
    return private_errors(layers, energies, even_private_ranks(layers, ranks))


def best_private_losses(layers, energies, costs, budget):
    """Returns what private LoRAs leave whose ranks lie where they explain most."""
    return private_errors(layers, energies, best_private_ranks(layers, costs, budget))


@pytest.mark.parametrize("rank", [(3,), (3, 2, 1), (6, 3)])
def test_private_losses_are_those_of_dense_truncated_svds(rng, rank):
    dense, layers, energies = family(rng)
    losses = private_losses(layers, energies, [rank] * 2)
    even = sum(rank) // 3
    expected = sum((part - truncated(part, even)).square().sum((1, 2)) for part in dense)
    assert_close(losses, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [(1,), (2,), (3, 1), (4, 3, 1)])
def test_leftover_ranks_go_to_the_largest_gains(rng, rank):
    dense, layers, energies = family(rng)
    before = energies.clone()
    losses = private_losses(layers, energies, [rank] * 2)
    even, rest = divmod(sum(rank), 3)
    expected = torch.zeros(3, dtype=torch.float64)
    for part in dense:
        values = torch.linalg.svdvals(part).square()
        ranking = sorted(range(3), key=lambda c: -float(values[c, even]))
        for place, c in enumerate(ranking):
            expected[c] += values[c, even + (place < rest) :].sum()
    assert_close(losses, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(energies, before)


def test_ranks_may_differ_by_layer_in_private_losses(rng):
    dense, layers, energies = family(rng)
    losses = private_losses(layers, energies, [(3,), (6,)])
    expected = sum(
        (part - truncated(part, rank)).square().sum((1, 2))
        for part, rank in zip(dense, (1, 2), strict=True)
    )
    assert_close(losses, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [(24,), (25,), (90, 1)])
def test_private_loras_of_full_rank_leave_nothing(rng, rank):
    _, layers, energies = family(rng, shapes=((9, 8),))
    losses = private_losses(layers, energies, [rank])
    assert_close(losses, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)


def test_private_losses_of_equal_checkpoints_are_zero():
    layer = compute_spectra(torch.zeros(2, 4, 5), around_mean([1.0] * 3).to_deviations)
    energies = torch.zeros(1, 3, dtype=torch.float64)
    assert private_losses([layer], energies, [(2,)]).tolist() == [0.0, 0.0, 0.0]


# within a budget


def figures_of(problem, costs):
    """Spectra, energies and Gram matrix of a problem whose slices are all deviations; costs by layer."""
    slices = [core for batch in problem.batches for core in batch.slices]
    layers = [compute_spectra(core, around_base(len(core)).to_deviations) for core in slices]
    gram = sum(core.flatten(1) @ core.flatten(1).mT for core in slices)
    assert len(costs) == len(layers)
    return layers, [float(core.square().sum()) for core in slices], [gram]


def even_price(problem, costs):
    ranks = [sum(batch.ranks) for batch in problem.batches for _ in batch.slices]
    return sum(cost * rank for cost, rank in zip(costs, ranks, strict=True))


def budget_bound_of(problem, costs, budget):
    layers, energies, grams = figures_of(problem, costs)
    return budget_bound(layers, energies, costs, budget, problem.shape[1], grams)


@pytest.mark.parametrize("shape", [(3, 6, 9), (3, 9, 6), (1, 5, 7), (4, 3, 20)])
def test_gains_sum_to_the_smaller_unfoldings_energy(rng, shape):
    core = normal(rng, *shape)
    gains = compute_spectra(core, around_base(shape[0]).to_deviations).gains
    assert len(gains) == max(shape[1:])
    rows = torch.linalg.svdvals(core.transpose(0, 1).flatten(1)).square()
    columns = torch.linalg.svdvals(core.flatten(0, 1)).square()
    for rank in range(len(gains) + 1):
        held = min(float(rows[:rank].sum()), float(columns[:rank].sum()))
        assert float(gains[:rank].sum()) == pytest.approx(held, rel=1e-9)
    assert bool((gains.diff() <= 1e-9).all())
    assert bool((gains >= 0).all())


@pytest.mark.parametrize("seed", range(4))
def test_no_solution_is_below_the_budget_bound(seed):
    problem = random_family(seed)
    costs = [3.0, 2.0, 5.0]
    bound = budget_bound_of(problem, costs, even_price(problem, costs))
    assert 0 < bound <= bound_of(problem) * (1 + 1e-9)
    assert solved(problem).loss >= bound


def test_more_bytes_never_raise_the_bound():
    problem = random_family(1)
    bounds = [budget_bound_of(problem, [3.0, 2.0, 5.0], budget) for budget in range(0, 120, 3)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] == pytest.approx(1)
    assert bounds[5] < bounds[0]


def best_of_all_ranks(slices, costs, budget):
    """The least loss of truncated SVDs whose ranks cost no more, by trying all of them."""
    tails = [torch.linalg.svdvals(matrix).square() for matrix in slices]
    choices = product(*(range(len(values) + 1) for values in tails))
    losses = [
        sum(float(values[rank:].sum()) for values, rank in zip(tails, ranks, strict=True))
        for ranks in choices
        if sum(cost * rank for cost, rank in zip(costs, ranks, strict=True)) <= budget
    ]
    return min(losses) / sum(float(values.sum()) for values in tails)


@pytest.mark.parametrize("budget", [2, 4, 8, 14, 18])
def test_two_checkpoints_attain_the_budget_bound_at_equal_costs(rng, budget):
    problem = problem_of((normal(rng, 2, 1, 5, 4), (2,)), (3 * normal(rng, 1, 1, 4, 5), (2,)))
    slices = [core[0] for batch in problem.batches for core in batch.slices]
    costs = [2.0] * 3
    dense = best_of_all_ranks(slices, costs, budget)
    assert budget_bound_of(problem, costs, budget) == pytest.approx(dense, rel=1e-9)


@pytest.mark.parametrize("budget", range(0, 30, 3))
def test_two_checkpoints_approach_the_budget_bound_at_unequal_costs(rng, budget):
    problem = problem_of((normal(rng, 2, 1, 5, 4), (2,)), (3 * normal(rng, 1, 1, 4, 5), (2,)))
    slices = [core[0] for batch in problem.batches for core in batch.slices]
    costs = [1.0, 2.0, 3.0]
    dense = best_of_all_ranks(slices, costs, budget)
    bound = budget_bound_of(problem, costs, budget)
    largest = max(float(torch.linalg.svdvals(matrix)[0]) ** 2 for matrix in slices)
    assert bound <= dense + 1e-12
    assert dense <= bound + largest / problem.energy


@pytest.mark.parametrize("shape", [(1, 6, 9), (1, 9, 6)])
def test_promises_of_two_checkpoints_are_their_directions_energies(rng, shape):
    core, contrasts = normal(rng, *shape), around_mean([1.0, 1.0])
    promises = compute_spectra(core, contrasts.to_deviations).promises(1)
    assert_close(promises, torch.linalg.svdvals(core[0]).square())


@pytest.mark.parametrize("k", [2, 3, 5])
def test_promises_fall_and_add_up_to_everything(rng, k):
    contrasts = around_mean([1.0] * k)
    core = stack_of(rng, 1, k - 1, 7, 9, 0.7)[0]
    core = normal(rng, *core.shape) if k == 2 else core
    layer = compute_spectra(core, contrasts.to_deviations)
    promises = layer.promises(k - 1)
    assert len(promises) == (k - 1) * 7
    assert bool((promises >= -1e-12).all())
    assert bool((promises.diff() <= 1e-9 * float(promises[0])).all())
    assert float(promises.sum()) == pytest.approx(float(core.square().sum()))


def test_best_private_losses_are_those_of_the_best_choice(rng):
    dense, layers, energies = family(rng, shapes=((3, 4), (4, 3)), k=2)
    costs, budget = [7.0, 7.0], 35.0
    losses = best_private_losses(layers, energies, costs, budget)
    expected = min(
        sum(
            float(torch.linalg.svdvals(dense[i // 2][i % 2])[rank:].square().sum())
            for i, rank in enumerate(ranks)
        )
        for ranks in product(range(4), repeat=4)
        if 7 * sum(ranks) <= budget
    )
    assert float(losses.sum()) == pytest.approx(expected)
    assert bool((losses <= energies.sum(0) + 1e-9).all())


def test_private_loras_with_chosen_ranks_beat_even_ones(rng):
    dense, layers, energies = family(rng)
    basis = around_mean([1.0] * 3).to_deviations
    layers[1] = compute_spectra(5 * torch.einsum("kd,kpq->dpq", basis, dense[1]), basis)
    energies[1] *= 25
    costs = [17.0, 16.0]
    even = private_losses(layers, energies, [(3, 2, 1)] * 2).sum()
    best = best_private_losses(layers, energies, costs, 6 * sum(costs)).sum()
    assert float(best) < float(even)
    nothing = torch.zeros(2, 3, dtype=torch.float64)
    silent = [compute_spectra(torch.zeros(2, 4, 5), around_mean([1.0] * 3).to_deviations)] * 2
    assert best_private_losses(silent, nothing, costs, 99.0).tolist() == [0, 0, 0]
