import pytest
import torch
from dense_oracles import (
    dense_blocks,
    dense_loss,
    normal,
    problem_of,
    random_family,
    seeded,
    stack_of,
    tail,
    with_spectrum,
)
from torch.testing import assert_close

from hyper_merge.decomposition.greedy import leading_multipliers, solve_greedy
from hyper_merge.decomposition.ll1 import StoppingCriterion
from hyper_merge.decomposition.problem import Problem


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
