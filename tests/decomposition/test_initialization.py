from dataclasses import replace

import pytest
import torch
from dense_oracles import (
    dense_loss,
    normal,
    problem_of,
    random_family,
    seeded,
    stack_of,
)
from torch.testing import assert_close

from hyper_merge.decomposition.greedy import leading_multipliers, solve_greedy
from hyper_merge.decomposition.initialization import SearchEffort, best_start, pilot
from hyper_merge.decomposition.ll1 import StoppingCriterion, initial_factors, solve_ll1
from hyper_merge.decomposition.problem import Problem


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
