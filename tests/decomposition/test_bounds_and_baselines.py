import pytest
import torch
from dense_oracles import normal, problem_of, random_family, stack_of, tail, truncated
from torch.testing import assert_close

from hyper_merge.decomposition.bounds import (
    budget_bound,
    lower_bound,
    private_losses,
    spectra,
)
from hyper_merge.decomposition.contrasts import around_base, around_mean
from hyper_merge.decomposition.greedy import solve_greedy
from hyper_merge.decomposition.ll1 import Stopping, factors_from, solve
from hyper_merge.decomposition.starts import best_start


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bound_of(problem, outside=0.0):
    """The bound of a problem whose slices are all deviations; `outside` in its first layer."""
    layers, energies, ranks, grams = [], [], [], []
    for batch in problem.batches:
        for core in batch.slices:
            layers.append(spectra(core, around_base(len(core)).to_deviations))
            energies.append(float(core.square().sum()))
            ranks.append(batch.ranks)
            grams.append(core.flatten(1) @ core.flatten(1).mT)
    energies[0] += outside
    return lower_bound(layers, energies, ranks, [sum(grams)])


def solved(problem, sweeps=40):
    start = best_start(problem, [], [], seeded(1))
    return solve(problem, factors_from(problem, start, seeded(2)), start, Stopping(sweeps, 1e-9))


@pytest.mark.parametrize("shape", [(3, 6, 9), (3, 9, 6), (1, 5, 5)])
def test_spectra_are_dense_squared_singular_values(rng, shape):
    core, contrasts = normal(rng, *shape), around_mean([1.0, 2.0, 1.0, 3.0][: shape[0] + 1])
    found = spectra(core, contrasts.to_deviations)
    rows, columns = core.transpose(0, 1).flatten(1), core.flatten(0, 1).mT
    for values, unfolding in ((found.rows, rows), (found.columns, columns)):
        dense = torch.zeros(len(unfolding), dtype=torch.float64)
        dense[: min(unfolding.shape)] = torch.linalg.svdvals(unfolding).square()
        assert_close(values, dense, rtol=1e-9, atol=1e-9)
    own = torch.einsum("kd,dpq->kpq", contrasts.to_deviations, core)
    assert_close(found.private, torch.linalg.svdvals(own).square(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_no_solution_is_below_the_bound(seed):
    problem = random_family(seed)
    bound = bound_of(problem)
    assert bound > 0
    assert solved(problem).loss >= bound * (1 - 1e-9)
    assert solve_greedy(problem, seeded(), Stopping(6, 0.0)).loss >= bound * (1 - 1e-9)


@pytest.mark.parametrize("shape", [(2, 1, 10, 8), (2, 1, 8, 10)])
def test_two_checkpoints_attain_the_bound(rng, shape):
    problem = problem_of((normal(rng, *shape), (3, 1)))
    dense = tail(problem.batches[0].slices, 4) / problem.energy
    assert_close(bound_of(problem), dense)
    assert_close(solved(problem, 300).loss, dense, rtol=1e-4, atol=0)


def test_one_block_of_full_rank_attains_the_bound_along_the_checkpoints(rng):
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
    layer = spectra(core, around_mean([1.0] * 3).to_deviations)
    gram = torch.zeros(2, 2, dtype=torch.float64)
    assert lower_bound([layer], [0.0], [(1,)], [gram]) == 0.0
    assert lower_bound([], [], [], [gram]) == 0.0
    assert budget_bound([layer], [0.0], ([8.0], 8.0), 1, [gram]) == 0.0


def family(rng, shapes=((9, 8), (6, 10)), k=3):
    """Deviations of k checkpoints per layer, with spectra and energies."""
    contrasts = around_mean([1.0] * k)
    dense = [stack_of(rng, 1, k, *shape, 0.7)[0] for shape in shapes]
    layers = [
        spectra(torch.einsum("kd,kpq->dpq", contrasts.to_deviations, part), contrasts.to_deviations)
        for part in dense
    ]
    return dense, layers, torch.stack([part.square().sum((1, 2)) for part in dense])


@pytest.mark.parametrize("rank", [(3,), (3, 2, 1), (6, 3)])
def test_private_losses_are_those_of_dense_truncated_svds(rng, rank):
    dense, layers, energies = family(rng)
    found = private_losses(layers, energies, [rank] * 2)
    each = sum(rank) // 3
    wanted = sum((part - truncated(part, each)).square().sum((1, 2)) for part in dense)
    assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [(1,), (2,), (3, 1), (4, 3, 1)])
def test_ranks_that_do_not_divide_go_to_those_who_gain_most(rng, rank):
    dense, layers, energies = family(rng)
    before = energies.clone()
    found = private_losses(layers, energies, [rank] * 2)
    each, rest = divmod(sum(rank), 3)
    wanted = torch.zeros(3, dtype=torch.float64)
    for part in dense:
        values = torch.linalg.svdvals(part).square()
        order = sorted(range(3), key=lambda c: -float(values[c, each]))
        for place, c in enumerate(order):
            wanted[c] += values[c, each + (place < rest) :].sum()
    assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert torch.equal(energies, before)


def test_ranks_may_differ_by_layer_in_private_losses(rng):
    dense, layers, energies = family(rng)
    found = private_losses(layers, energies, [(3,), (6,)])
    wanted = sum(
        (part - truncated(part, each)).square().sum((1, 2))
        for part, each in zip(dense, (1, 2), strict=True)
    )
    assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [(24,), (25,), (90, 1)])
def test_private_loras_of_full_rank_leave_nothing(rng, rank):
    _, layers, energies = family(rng, shapes=((9, 8),))
    found = private_losses(layers, energies, [rank])
    assert_close(found, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)


def test_private_losses_of_equal_checkpoints_are_zero():
    layer = spectra(torch.zeros(2, 4, 5), around_mean([1.0] * 3).to_deviations)
    energies = torch.zeros(1, 3, dtype=torch.float64)
    assert private_losses([layer], energies, [(2,)]).tolist() == [0.0, 0.0, 0.0]
