import itertools
import weakref
from dataclasses import replace

import pytest
import torch
from dense_oracles import (
    dense_approximation,
    dense_blocks,
    dense_loss,
    dense_penalties,
    normal,
    orthogonal,
    problem_of,
    random_factors,
    random_family,
    stack_of,
    tail,
    truncated,
    with_spectrum,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hyper_merge.decomposition.contrasts import around_mean
from hyper_merge.decomposition.initialization import best_start
from hyper_merge.decomposition.ll1 import (
    StoppingCriterion,
    compute_statistics,
    fit_multipliers,
    initial_factors,
    solve_ll1,
    sweep,
)
from hyper_merge.decomposition.problem import Batch, Problem

FOREVER = float("-inf")  # a tolerance that no sweep meets


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def solved(problem, sweeps=100, tolerance=1e-9):
    start = best_start(problem, [], [], seeded(1))
    factors = initial_factors(problem, start, seeded(2))
    return solve_ll1(problem, factors, start, StoppingCriterion(sweeps, tolerance))


def rises(losses):
    return max(b - a for a, b in itertools.pairwise(losses))


def halves(rng, decay=0.6):
    """Two checkpoints of two layers, as slices (b, 1, p, q), and their differences."""
    spectrum = decay ** torch.arange(8.0).double()
    first = normal(rng, 2, 10, 8)
    second = first + torch.stack([with_spectrum(rng, 10, 8, spectrum) for _ in range(2)])
    contrasts = around_mean([1.0, 1.0])
    return contrasts, contrasts.to_slices * (second - first)[:, None], second - first


def test_two_checkpoints_and_one_block_are_a_truncated_svd(rng):
    contrasts, slices, difference = halves(rng)
    problem = problem_of((slices, (3,)))
    solution = solved(problem)
    deviations = torch.einsum(
        "ks,bspq->bkpq",
        contrasts.to_deviations,
        dense_approximation(problem.batches[0], solution.factors[0], solution.multipliers),
    )
    assert_close(deviations[:, 1], truncated(difference / 2, 3), rtol=0, atol=1e-5)
    assert_close(deviations[:, 0], -deviations[:, 1], rtol=0, atol=1e-12)
    assert_close(solution.loss, tail(slices, 3) / problem.energy, rtol=1e-6, atol=0)


@pytest.mark.parametrize("decay", [0.8, 0.5, 0.2])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 1), (1, 2, 1), (3, 2, 1)])
def test_any_ranks_for_two_checkpoints_are_one_truncated_svd(decay, ranks):
    for seed in range(3):
        rng = seeded(seed)
        _, slices, _ = halves(rng, decay)
        slices = slices + 1e-3 * normal(rng, *slices.shape)  # a noise floor
        problem = problem_of((slices, ranks))
        best = tail(slices, sum(ranks)) / problem.energy
        assert_close(solved(problem).loss, best, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_planted_blocks_are_recovered(seed):
    rng, ranks = seeded(seed), (3, 2, 1)
    multipliers = torch.eye(4, 3, dtype=torch.float64) + 0.1 * normal(rng, 4, 3)
    planted = [
        torch.stack(
            [orthogonal(rng, p, r) @ (orthogonal(rng, q, r) * (1 + i)).mT for _ in range(2)]
        )
        for i, (p, q, r) in enumerate([(14, 12, r) for r in ranks])
    ]
    slices = torch.einsum("kr,rbpq->bkpq", multipliers, torch.stack(planted))
    problem = problem_of((slices, ranks))
    solution = solved(problem, sweeps=500, tolerance=0.0)
    assert solution.loss < 1e-8
    assert dense_loss(problem, solution.factors, solution.multipliers) < 1e-8
    blocks = dense_blocks(problem.batches[0], solution.factors[0]).transpose(0, 1)  # (R, b, p, q)
    for r, truth in enumerate(planted):  # ranks differ, so the order is theirs
        scale = float((blocks[r] * truth).sum() / truth.square().sum())
        assert_close(blocks[r] / scale, truth, rtol=0, atol=1e-3)
        assert_close(solution.multipliers[:, r] * scale, multipliers[:, r], rtol=0, atol=1e-3)


def test_planted_blocks_of_equal_rank_are_recovered(rng):
    multipliers = torch.linalg.qr(normal(rng, 5, 3))[0] + 0.1 * normal(rng, 5, 3)
    planted = torch.stack([orthogonal(rng, 12, 2) @ orthogonal(rng, 12, 2).mT for _ in range(3)])
    problem = problem_of((torch.einsum("kr,rpq->kpq", multipliers, planted)[None], (2, 2, 2)))
    solution = solved(problem, sweeps=500, tolerance=0.0)
    assert solution.loss < 1e-8
    flat = dense_blocks(problem.batches[0], solution.factors[0])[0].flatten(1)
    cosines = (
        torch.nn.functional.normalize(flat) @ torch.nn.functional.normalize(planted.flatten(1)).mT
    )
    best = max(
        min(float(cosines[r, permutation[r]].abs()) for r in range(3))
        for permutation in itertools.permutations(range(3))
    )
    assert best > 1 - 1e-6


@pytest.mark.parametrize("ranks", [(6,) * 4, (6, 6, 6, 6, 2)])
def test_full_rank_is_exact(rng, ranks):
    problem = problem_of((normal(rng, 2, 4, 6, 7), ranks))
    solution = solved(problem)
    assert dense_loss(problem, solution.factors, solution.multipliers) < 1e-10
    assert abs(solution.loss) < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_the_loss_never_rises(seed):
    problem = random_family(seed)
    k, count = problem.shape
    start = normal(seeded(seed), k, count)
    solution = solve_ll1(
        problem, initial_factors(problem, start, seeded()), start, StoppingCriterion(60, FOREVER)
    )
    assert 30 <= len(solution.losses) <= 60  # steps ahead that do not help are taken back
    assert rises(solution.losses) <= 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_a_float32_loss_rises_by_rounding_alone(seed):
    problem = random_family(seed, torch.float32)
    k, count = problem.shape
    start = normal(seeded(seed), k, count)
    solution = solve_ll1(
        problem, initial_factors(problem, start, seeded()), start, StoppingCriterion(60, FOREVER)
    )
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(solution.losses))
    assert solution.factors[0].up.dtype == torch.float32
    exact = dense_loss(problem, solution.factors, solution.multipliers)
    assert_close(solution.loss, exact, rtol=1e-5, atol=0)


def swamp(rng):  # (1, k, p, q)
    """A tensor which two rank-one blocks come ever closer to, and only their limit reaches."""
    up, down, checkpoint = orthogonal(rng, 6, 2), orthogonal(rng, 6, 2), orthogonal(rng, 3, 2)
    return sum(
        torch.einsum("k,p,q->kpq", checkpoint[:, c], up[:, a], down[:, b])
        for c, a, b in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    )[None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_never_rises_in_a_swamp(dtype, seed):
    """The dense loss: the reported one is rounded like blocks that are large and nearly cancel."""
    rng = seeded(seed)
    problem = problem_of((swamp(rng).to(dtype), (1, 1)))
    multipliers = normal(rng, 3, 2)
    factors = initial_factors(problem, multipliers, rng)
    losses = []
    for _ in range(200):
        factors, multipliers, sums = sweep(problem, factors, multipliers)
        losses.append(dense_loss(problem, factors, multipliers))
        assert abs(sums.loss(multipliers) - losses[-1]) < (1e-9 if dtype == torch.float64 else 3e-5)
    assert losses[0] > losses[-1] > 0
    assert rises(losses) <= (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_ridge_keeps_blocks_from_cancelling_each_other(seed):
    rng = seeded(seed)
    plain = problem_of((swamp(rng), (1, 1)))
    start = normal(rng, 3, 2)
    penalties, losses = [], []
    for problem in (plain, replace(plain, ridge=0.01)):
        stopping = StoppingCriterion(300, FOREVER)
        solution = solve_ll1(
            problem, initial_factors(problem, start, seeded(seed)), start, stopping
        )
        of_blocks = dense_penalties(problem, solution.factors, solution.multipliers)
        penalties.append(float(of_blocks.sum()))
        losses.append(solution.loss)
        dense = dense_loss(problem, solution.factors, solution.multipliers)
        assert_close(solution.loss, dense, rtol=0, atol=1e-9)
        free = fit_multipliers(compute_statistics(problem, solution.factors))
        assert_close(solution.multipliers, free, rtol=1e-9, atol=1e-9)
    assert penalties[0] > 10
    assert penalties[1] < 3
    assert losses[1] < losses[0] + 0.05


@pytest.mark.parametrize("ridge", [0.01, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_the_objective_with_a_ridge_never_rises(seed, ridge):
    problem = replace(random_family(seed), ridge=ridge)
    rng = seeded(seed)
    multipliers = normal(rng, *problem.shape)
    factors = initial_factors(problem, multipliers, rng)
    values = []
    for _ in range(60):
        factors, multipliers, _ = sweep(problem, factors, multipliers)
        penalties = dense_penalties(problem, factors, multipliers)
        values.append(dense_loss(problem, factors, multipliers) + ridge * float(penalties.sum()))
    assert values[0] > values[-1]
    assert rises(values) <= 1e-12


def test_the_last_loss_is_the_dense_one():
    problem = random_family(1)
    solution = solved(problem, sweeps=20)
    assert solution.loss == solution.losses[-1]
    exact = dense_loss(problem, solution.factors, solution.multipliers)
    assert_close(solution.loss, exact, rtol=1e-9, atol=0)


def test_energy_outside_of_the_cores_stays_unexplained(rng):
    slices = normal(rng, 1, 3, 6, 6)
    inside, outside = problem_of((slices, (3,))), problem_of((slices, (3,)), outside=40.0)
    start = normal(rng, 3, 1)
    losses = [
        solve_ll1(
            problem, initial_factors(problem, start, seeded()), start, StoppingCriterion(9, FOREVER)
        ).loss
        for problem in (inside, outside)
    ]
    assert_close(losses[1] * outside.energy, losses[0] * inside.energy + 40.0)


def test_permuted_checkpoints_permute_the_rows_of_multipliers(rng):
    permutation = [2, 0, 3, 1]
    slices, start = stack_of(rng, 2, 4, 9, 8, 0.7), normal(rng, 4, 2)
    solution, permuted = (
        solve_ll1(
            problem,
            initial_factors(problem, multipliers, seeded(3)),
            multipliers,
            StoppingCriterion(15, 0),
        )
        for problem, multipliers in (
            (problem_of((slices, (2, 2))), start),
            (problem_of((slices[:, permutation], (2, 2))), start[permutation]),
        )
    )
    assert_close(permuted.multipliers, solution.multipliers[permutation], rtol=1e-6, atol=1e-8)
    assert_close(permuted.losses, solution.losses, rtol=1e-8, atol=1e-10)


def test_layers_solve_alike_in_one_batch_and_in_several(rng):
    slices, start = stack_of(rng, 3, 4, 9, 8, 0.7), normal(rng, 4, 2)
    together = problem_of((slices, (2, 1)))
    factors = random_factors(rng, together.batches[0])
    apart = problem_of(*((slices[i : i + 1], (2, 1)) for i in range(3)))
    pieces = [type(factors)(factors.up[i : i + 1], factors.down[i : i + 1]) for i in range(3)]
    one = solve_ll1(together, [factors], start, StoppingCriterion(10, FOREVER))
    many = solve_ll1(apart, pieces, start, StoppingCriterion(10, FOREVER))
    assert_close(many.multipliers, one.multipliers, rtol=1e-7, atol=1e-9)
    assert_close(torch.cat([f.up for f in many.factors]), one.factors[0].up, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zero_deviations_are_solved_without_nan(dtype):
    problem = problem_of((torch.zeros(2, 3, 6, 5, dtype=dtype), (2, 1)))
    solution = solved(problem, sweeps=5)
    assert solution.loss == 0.0
    assert torch.isfinite(solution.multipliers).all()
    for factors in solution.factors:
        assert torch.isfinite(factors.up).all()
        assert torch.isfinite(factors.down).all()


def test_one_layer_of_zeros_among_others_gets_zero_blocks(rng):
    slices = stack_of(rng, 2, 3, 8, 7, 0.7)
    slices[0] = 0
    problem = problem_of((slices, (2, 1)))
    solution = solved(problem, sweeps=20)
    zero = dense_approximation(problem.batches[0], solution.factors[0], solution.multipliers)[0]
    assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-9)


def test_checkpoints_that_agree_get_equal_multipliers(rng):
    slices = stack_of(rng, 1, 2, 8, 7, 0.7)[:, [0, 1, 1]]
    solution = solved(problem_of((slices, (2, 1))), sweeps=20)
    assert_close(solution.multipliers[1], solution.multipliers[2], rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(4, 8),
    st.integers(4, 8),
    st.integers(0, 99),
)
def test_the_loss_is_honest_for_any_shape(ranks, k, p, q, seed):
    rng = seeded(seed)
    problem = problem_of((normal(rng, 2, k, p, q), ranks))
    start = normal(rng, k, len(ranks))
    solution = solve_ll1(
        problem, initial_factors(problem, start, rng), start, StoppingCriterion(8, FOREVER)
    )
    assert solution.multipliers.shape == (k, len(ranks))
    assert solution.factors[0].up.shape == (2, p, sum(ranks))
    assert solution.factors[0].down.shape == (2, sum(ranks), q)
    exact = dense_loss(problem, solution.factors, solution.multipliers)
    assert_close(solution.loss, exact, rtol=0, atol=1e-6)


def test_sweeps_are_reported_and_stop_at_the_tolerance():
    problem = random_family(0)
    k, count = problem.shape
    start, reports = normal(seeded(), k, count), []
    factors = initial_factors(problem, start, seeded())
    solution = solve_ll1(problem, factors, start, StoppingCriterion(500, 1e-3, reports.append))
    taken_back = [loss for loss in reports if loss not in solution.losses]
    assert [loss for loss in reports if loss in solution.losses] == list(solution.losses)
    assert all(loss > solution.loss for loss in taken_back)
    assert 2 < len(reports) < 500
    changes = [(a - b) / a for a, b in itertools.pairwise(solution.losses)]
    assert changes[-1] <= 1e-3
    assert min(changes[:-1]) > 1e-3


def test_a_callback_may_stop_the_sweeps():
    def stop(loss):
        raise KeyboardInterrupt

    problem = random_family(0)
    start = normal(seeded(), *problem.shape)
    factors = initial_factors(problem, start, seeded())
    with pytest.raises(KeyboardInterrupt):
        solve_ll1(problem, factors, start, StoppingCriterion(5, 0.0, stop))


def test_a_parallel_map_gives_the_same_solution(parallel):
    plain = random_family(4)
    shared = Problem(plain.batches, plain.energy, parallel)
    start = normal(seeded(), *plain.shape)
    results = []
    for problem in (plain, shared):
        factors = initial_factors(problem, start, seeded(3))
        results.append(
            (
                compute_statistics(problem, factors),
                solve_ll1(problem, factors, start, StoppingCriterion(10, FOREVER)),
            )
        )
    (dense, one), (other, many) = results
    assert_close(other.gram, dense.gram)
    assert_close(other.cross, dense.cross)
    assert_close(many.losses, one.losses, rtol=1e-9, atol=1e-12)
    assert_close(many.multipliers, one.multipliers, rtol=1e-7, atol=1e-9)
    for a, b in zip(one.factors, many.factors, strict=True):
        assert_close(b.up @ b.down, a.up @ a.down, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("sweeps", "sets"), [(10, 2), (2, 1), (1, 1)])
def test_a_solve_keeps_only_as_many_sets_of_factors_as_it_needs(rng, sweeps, sets):
    """Two while it may go back to the one before; the first and a last plain one replace theirs."""
    batches = tuple(
        Batch(torch.randn(1, 3, 20, 20, generator=rng), (4, 2), (index,)) for index in range(20)
    )
    energy = sum(float(batch.slices.square().sum()) for batch in batches)
    alive, counts = set(), []

    def counted(tensors):
        for tensor in tensors:
            alive.add(id(tensor))
            weakref.finalize(tensor, alive.discard, id(tensor))
        counts.append(len(alive))
        return list(tensors)

    problem = Problem(batches, energy, keep=counted)
    multipliers = torch.randn(3, 2, generator=rng).double()
    start = iter(initial_factors(problem, multipliers, rng))
    solve_ll1(problem, start, multipliers, StoppingCriterion(sweeps, 0.0))
    assert max(counts) < 2 * (sets + 0.3) * len(batches)
