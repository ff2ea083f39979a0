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


def small_effort(**changes):
    return replace(SearchEffort.FULL, **changes)


def test_a_pilot_of_few_small_layers_has_them_all():
    problem = random_family(0)
    chosen = pilot(problem, seeded())
    assert sum(len(batch.layers) for batch in chosen.batches) == sum(
        len(batch.layers) for batch in problem.batches
    )
    assert chosen.energy == pytest.approx(
        sum(float(batch.slices.double().square().sum()) for batch in problem.batches), rel=1e-5
    )
    assert chosen.ridge == problem.ridge


def test_half_of_the_pilot_layers_have_the_most_energy_and_half_are_drawn(rng):
    sizes = torch.tensor([1.0, 9.0, 2.0, 8.0, 3.0, 0.0, 2.0, 1.0])
    slices = normal(rng, 8, 2, 5, 5) * sizes[:, None, None, None]
    energies = slices.square().sum((1, 2, 3))
    drawn = set()
    for seed in range(40):
        chosen = pilot(problem_of((slices, (1,))), seeded(seed), small_effort(layers=4))
        layers = torch.cat([batch.slices for batch in chosen.batches])
        places = {int((energies - x).abs().argmin()) for x in layers.square().sum((1, 2, 3))}
        assert len(places) == 4
        assert {1, 3} <= places
        drawn |= places
    assert drawn == {0, 1, 2, 3, 4, 6, 7}  # all that have any energy


def test_pilot_layers_keep_their_leading_directions(rng):
    strong = 10 * normal(rng, 30, 4) @ normal(rng, 3, 4, 4) @ normal(rng, 4, 50)
    layer = strong + 0.01 * normal(rng, 3, 30, 50)
    chosen = pilot(problem_of((layer[None], (3,))), seeded(), small_effort(side=8))
    (batch,) = chosen.batches
    assert batch.slices.shape == (1, 3, 8, 8)
    flat, expected = batch.slices[0].flatten(1), layer.flatten(1)
    assert_close(flat @ flat.mT, expected @ expected.mT, rtol=1e-3, atol=1.0)  # of 10,000


def test_pilot_layers_of_unlike_sizes_stand_side_by_side(rng):
    problem = problem_of((normal(rng, 2, 2, 5, 9), (4, 2)), (normal(rng, 1, 2, 12, 3), (2, 0)))
    chosen = pilot(problem, seeded())
    (shape,) = {batch.slices.shape[1:] for batch in chosen.batches}
    assert shape == (2, 12, 12)
    (ranks,) = {batch.ranks for batch in chosen.batches}
    assert ranks == (3, 1)  # the mean of all layers', which these sizes have room for
    many = pilot(problem_of((normal(rng, 1, 2, 40, 40), (60, 20))), seeded(), small_effort(side=16))
    assert many.batches[0].ranks == (8, 2)  # in their proportion


def test_a_pilot_is_searched_by_all_workers(rng):
    chosen = pilot(problem_of((normal(rng, 60, 2, 5, 5), (1,))), seeded())
    assert [len(batch.layers) for batch in chosen.batches] == [12, 12, 12, 12]
