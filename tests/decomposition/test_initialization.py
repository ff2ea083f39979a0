from dataclasses import replace

import pytest
import torch
from dense_oracles import (
    dense_blocks,
    dense_loss,
    normal,
    problem_of,
    random_family,
    stack_of,
    tail,
    with_spectrum,
)
from torch.testing import assert_close

from hyper_merge.decomposition.greedy import leading_multipliers, solve_greedy
from hyper_merge.decomposition.initialization import SearchEffort, best_start, pilot
from hyper_merge.decomposition.ll1 import Problem, StoppingCriterion, initial_factors, solve_ll1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_losses_are_those_of_dense_deflation(seed):
    problem = random_family(seed)
    before = [batch.slices.clone() for batch in problem.batches]
    solution = solve_greedy(problem, seeded(), StoppingCriterion(6, 0.0))
    left_over = [slices.clone() for slices in before]
    for r, loss in enumerate(solution.losses):
        for slices, batch, factors in zip(
            left_over, problem.batches, solution.factors, strict=True
        ):
            block = dense_blocks(batch, factors)[:, r]
            slices.sub_(torch.einsum("k,bpq->bkpq", solution.multipliers[:, r], block))
        dense = sum(float(slices.square().sum()) for slices in left_over) / problem.energy
        assert_close(loss, dense, rtol=1e-8, atol=1e-12)
    assert list(solution.losses) == sorted(solution.losses, reverse=True)
    assert len(solution.losses) == problem.shape[1]
    assert_close(solution.loss, dense_loss(problem, solution.factors, solution.multipliers))
    for batch, slices in zip(problem.batches, before, strict=True):
        assert torch.equal(batch.slices, slices)


def test_the_first_greedy_block_is_a_truncated_svd(rng):
    column = normal(rng, 4)
    matrix = with_spectrum(rng, 9, 8, 0.5 ** torch.arange(8.0).double())
    problem = problem_of((torch.einsum("k,pq->kpq", column, matrix)[None], (3,)))
    solution = solve_greedy(problem, seeded(), StoppingCriterion(6, 0.0))
    best = tail(matrix, 3) / float(matrix.square().sum())
    assert best * (1 - 1e-9) <= solution.loss <= 1.1 * best
    cosine = torch.nn.functional.cosine_similarity(solution.multipliers[:, 0], column, dim=0)
    assert_close(cosine.abs(), torch.ones_like(cosine))


@pytest.mark.parametrize("seed", range(6))
def test_more_turns_never_make_a_greedy_block_worse(seed):
    problem = problem_of((stack_of(seeded(seed), 2, 3, 9, 8, 2.0), (2,)))
    losses = [solve_greedy(problem, seeded(), StoppingCriterion(n, 0.0)).loss for n in (1, 2, 6)]
    assert losses[0] >= losses[1] >= losses[2]


def test_greedy_reports_the_loss_after_every_block():
    reports = []
    solution = solve_greedy(random_family(1), seeded(), StoppingCriterion(3, 0.0, reports.append))
    assert tuple(reports) == solution.losses


def test_greedy_counts_energy_outside_of_the_cores(rng):
    slices = stack_of(rng, 1, 3, 8, 7, 0.7)
    inside, outside = (problem_of((slices, (2, 1)), outside=extra) for extra in (0.0, 5.0))
    losses = [
        solve_greedy(p, seeded(), StoppingCriterion(4, 0.0)).loss * p.energy
        for p in (inside, outside)
    ]
    assert_close(losses[1], losses[0] + 5.0, rtol=1e-3, atol=0)


def test_greedy_makes_zero_blocks_of_zero_deviations():
    problem = problem_of((torch.zeros(2, 3, 6, 5), (2, 1)))
    solution = solve_greedy(problem, seeded(), StoppingCriterion(6, 0.0))
    assert solution.losses == (0.0, 0.0)
    assert solution.multipliers.count_nonzero() == 0
    assert torch.isfinite(solution.factors[0].up).all()


def test_greedy_explains_all_that_one_block_can(rng):
    block = normal(rng, 10, 3) @ normal(rng, 3, 9)
    problem = problem_of((torch.einsum("k,pq->kpq", normal(rng, 4), block)[None], (3, 2)))
    solution = solve_greedy(problem, seeded(), StoppingCriterion(6, 0.0))
    assert max(map(abs, solution.losses)) < 1e-10


def test_a_parallel_map_gives_the_same_greedy_blocks(parallel):
    plain = random_family(0)
    one, many = (
        solve_greedy(problem, seeded(), StoppingCriterion(6, 0.0))
        for problem in (plain, Problem(plain.batches, plain.energy, parallel))
    )
    assert_close(many.losses, one.losses, rtol=1e-9, atol=1e-12)
    assert_close(many.multipliers.abs(), one.multipliers.abs(), rtol=1e-7, atol=1e-9)


def test_leading_multipliers_are_eigenvectors_of_the_dense_gram():
    problem = random_family(1)
    flat = torch.cat([batch.slices.transpose(0, 1).flatten(1) for batch in problem.batches], 1)
    gram = flat @ flat.mT
    leading = leading_multipliers(problem)
    values = (leading.mT @ gram @ leading).diagonal()
    assert_close(leading.mT @ leading, torch.eye(len(gram), dtype=torch.float64))
    assert_close(gram @ leading, leading * values, rtol=0, atol=1e-9)
    assert values.tolist() == sorted(values.tolist(), reverse=True)


@pytest.mark.parametrize("seed", range(6))
def test_the_joint_solution_is_never_above_the_greedy_one(seed):
    problem = random_family(seed)
    greedy = solve_greedy(problem, seeded(seed), StoppingCriterion(20, 0.0))
    start = best_start(problem, [], [], seeded(seed))
    factors = initial_factors(problem, start, seeded(seed))
    solution = solve_ll1(problem, factors, start, StoppingCriterion(60, 1e-5))
    assert solution.loss <= greedy.loss
    assert dense_loss(problem, solution.factors, solution.multipliers) <= greedy.loss


@pytest.mark.parametrize("kind", ["planned", "earlier"])
def test_a_planned_start_that_is_exact_wins(rng, kind):
    multipliers = normal(rng, 5, 3)
    starts = ([multipliers], []) if kind == "planned" else ([], [multipliers])
    blocks = torch.stack([normal(rng, 14, 3) @ normal(rng, 3, 14) for _ in range(3)])
    problem = problem_of((torch.einsum("kr,rpq->kpq", multipliers, blocks)[None], (3, 3, 3)))
    start = best_start(problem, *starts, seeded())
    cosines = torch.nn.functional.normalize(start, dim=0).mT @ torch.nn.functional.normalize(
        multipliers, dim=0
    )
    assert_close(cosines.abs().amax(0), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-2)


def test_earlier_starts_replace_random_ones(rng, monkeypatch):
    problem = problem_of((stack_of(rng, 1, 3, 6, 5, 0.7), (1, 1)))
    planned, earlier = normal(rng, 3, 2), normal(rng, 3, 2)
    tried = []

    def record(few, multipliers, generator):
        tried.append(multipliers)
        return initial_factors(few, multipliers, generator)

    monkeypatch.setattr("hyper_merge.decomposition.initialization.initial_factors", record)
    best_start(problem, [planned], [earlier], seeded())
    expected = [leading_multipliers(problem)[:, :2], planned, earlier]
    for start_tried, start in zip(tried, expected, strict=True):
        assert_close(start_tried, torch.nn.functional.normalize(start, dim=0))
    tried.clear()
    best_start(problem, [planned], [], seeded())
    assert len(tried) > 3
    assert_close(tried[1], torch.nn.functional.normalize(planned, dim=0))


def test_a_users_start_wins_or_changes_nothing(rng):
    multipliers = normal(rng, 5, 3)
    blocks = torch.stack([normal(rng, 14, 3) @ normal(rng, 3, 14) for _ in range(3)])
    problem = problem_of((torch.einsum("kr,rpq->kpq", multipliers, blocks)[None], (3, 3, 3)))
    start = best_start(problem, [], [], seeded(), user_starts=[multipliers])
    cosines = torch.nn.functional.normalize(start, dim=0).mT @ torch.nn.functional.normalize(
        multipliers, dim=0
    )
    assert_close(cosines.abs().amax(0), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-2)
    useless = torch.zeros(5, 3, dtype=torch.float64)
    plain, generator = best_start(problem, [], [], seeded()), seeded()
    assert torch.equal(best_start(problem, [], [], generator, user_starts=[useless]), plain)
    other = seeded()
    best_start(problem, [], [], other)
    assert torch.equal(generator.get_state(), other.get_state())  # nor what follows


@pytest.mark.parametrize("columns", [0, 1, 2, 7])
def test_planned_starts_of_any_width_fit_the_blocks(rng, columns):
    problem = problem_of((stack_of(rng, 1, 3, 6, 5, 0.7), (1, 1)))
    start = best_start(problem, [normal(rng, 3, columns).float()], [], seeded())
    assert start.shape == (3, 2)
    assert start.dtype == torch.float64
    assert torch.isfinite(start).all()


def test_a_start_follows_its_seed(rng):
    problem = problem_of((stack_of(rng, 1, 4, 6, 5, 0.3), (1, 1)))
    first, again = (best_start(problem, [], [], seeded(3)) for _ in range(2))
    assert torch.equal(first, again)


def test_a_parallel_map_gives_the_same_start(parallel):
    plain = random_family(2)
    one, many = (
        best_start(problem, [], [], seeded())
        for problem in (plain, Problem(plain.batches, plain.energy, parallel))
    )
    assert_close(many.abs(), one.abs(), rtol=1e-5, atol=1e-7)


def test_the_search_for_a_start_may_be_stopped():
    def stop(fraction):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        best_start(random_family(0), [], [], seeded(), on_progress=stop)


@pytest.mark.parametrize("count", [2, 5])
def test_the_search_for_a_start_reports_its_progress(rng, count):
    reports = []
    problem = problem_of((stack_of(rng, 1, count, 6, 5, 0.7), (1, 1)))
    best_start(problem, [normal(rng, count, 2)], [], seeded(), on_progress=reports.append)
    assert reports == sorted(reports)
    assert 0.9 < reports[-1] < 1 + 1e-9  # a start may be perfect before its last sweep
    assert max(b - a for a, b in zip([0, *reports], reports, strict=False)) < 0.2


@pytest.mark.parametrize("method", ["greedy", "joint"])
def test_every_item_of_a_solve_goes_through_the_map(rng, method):
    """So that a map which counts and stops sees to progress and interrupts."""
    calls = []

    def counting(function, *arguments):
        for items in zip(*arguments, strict=True):
            calls.append(function)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            yield function(*items)

    plain = problem_of(*((stack_of(rng, 1, 3, 6, 5, 0.7), (1, 1)) for _ in range(2)))
    problem = Problem(plain.batches, plain.energy, counting)

    def run():
        if method == "greedy":
            return solve_greedy(problem, seeded(), StoppingCriterion(3, 0.0))
        start = best_start(problem, [], [], seeded(), SearchEffort.QUICK)
        return solve_ll1(
            problem, initial_factors(problem, start, seeded()), start, StoppingCriterion(3, 0.0)
        )

    stop_at = 0
    run()
    assert len(calls) % 2 == 0
    count = len(calls)
    for stop_at in (1, count // 3, count - 1):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            run()
        assert len(calls) == stop_at


def test_a_small_problem_is_its_own_pilot():
    problem = random_family(0)
    chosen = pilot(problem)
    assert [batch.layers for batch in chosen.batches] == [b.layers for b in problem.batches]
    assert_close(chosen.energy, problem.energy)


def pilot_of_share(share):
    """Returns an effort whose pilot takes a share of the work, however small the problem is."""
    return replace(SearchEffort.FULL, pilot_entries=0, pilot_share=share)


def test_the_pilot_has_the_layers_of_most_energy(rng):
    slices = normal(rng, 4, 2, 5, 5) * torch.tensor([1.0, 9.0, 2.0, 8.0])[:, None, None, None]
    tiny = normal(rng, 1, 2, 4, 5) * 1e-3
    problem = problem_of((slices, (1,)), (tiny, (1,)))
    chosen = pilot(problem, pilot_of_share(0.5))
    assert [batch.layers for batch in chosen.batches] == [(1, 3)]
    assert torch.equal(chosen.batches[0].slices, slices[[1, 3]])
    assert_close(chosen.energy, float(slices[[1, 3]].square().sum()))


def test_a_pilot_counts_work_by_the_layers_ranks(rng):
    large, small = 2 * normal(rng, 8, 2, 9, 9), normal(rng, 8, 2, 9, 9)
    chosen = pilot(problem_of((large, (8,)), (small, (1,))), pilot_of_share(0.45))
    assert [len(batch.layers) for batch in chosen.batches] == [4]  # of 72 columns 32


def test_a_pilot_has_at_least_one_layer(rng):
    problem = problem_of((normal(rng, 2, 2, 5, 5), (1,)))
    small = replace(SearchEffort.FULL, pilot_entries=0)
    assert len(pilot(problem, small).batches[0].layers) == 1
