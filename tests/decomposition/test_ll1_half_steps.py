import itertools

import pytest
import torch
from dense_oracles import (
    dense_approximation,
    dense_blocks,
    dense_loss,
    normal,
    orthogonal,
    problem_of,
    random_factors,
    tail,
    with_spectrum,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hyper_merge.decomposition.ll1 import (
    Statistics,
    compute_statistics,
    fit_multipliers,
    initial_factors,
    split_blocks,
    sweep,
    update_downs,
    update_ups,
)
from hyper_merge.decomposition.problem import Batch, Factors

ridges = st.sampled_from([0.0, 0.01, 1.0])
small_ranks = st.lists(st.integers(1, 3), min_size=1, max_size=3)


@st.composite
def batches(draw):
    """A batch with factors and multipliers, all random, with ranks that every side has room for."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    ranks = tuple(draw(small_ranks))
    b, k = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    p, q = (sum(ranks) + draw(st.integers(0, 3)) for _ in range(2))
    batch = Batch(normal(rng, b, k, p, q), ranks, tuple(range(b)))
    return batch, random_factors(rng, batch), normal(rng, k, len(ranks))


def mode3_rows(batch, multipliers):  # (k, rho): the multiplier of every column
    return multipliers.repeat_interleave(torch.tensor(batch.ranks), 1)


def with_zeros(batch, multipliers, ridge):
    """The ridge as least squares: each block, times the size of its multipliers, should be nothing."""
    b, _, p, q = batch.slices.shape
    rows = torch.diag(ridge**0.5 * multipliers.norm(dim=0))
    zeros = batch.slices.new_zeros(b, len(rows), p, q)
    slices = torch.cat([batch.slices, zeros], 1)
    return Batch(slices, batch.ranks, batch.layers), torch.cat([multipliers, rows])


def well_conditioned(design):
    """The damping, 2e-14 of the squares, moves a fit by less than 1e-7 of its target then."""
    return bool((torch.linalg.cond(design) < 1e3).all())


@settings(deadline=None, max_examples=40)
@given(batches(), ridges)
def test_ups_are_the_dense_least_squares_solution(drawn, ridge):
    batch, factors, multipliers = drawn
    updated = update_ups(batch, factors, multipliers, ridge=ridge)
    batch, multipliers = with_zeros(batch, multipliers, ridge)
    weighted = torch.einsum("kc,bcq->bckq", mode3_rows(batch, multipliers), factors.down)
    design = weighted.flatten(2).mT  # (b, kq, rho)
    assume(well_conditioned(design))
    target = batch.slices.transpose(1, 2).flatten(2).mT  # (b, kq, p)
    expected = torch.linalg.lstsq(design, target, driver="gelsd").solution
    assert_close(design @ updated.up.mT, design @ expected, rtol=0, atol=1e-6)
    assert updated.down is factors.down


@settings(deadline=None, max_examples=40)
@given(batches(), ridges)
def test_downs_are_the_dense_least_squares_solution(drawn, ridge):
    batch, factors, multipliers = drawn
    updated = update_downs(batch, factors, multipliers, ridge=ridge)
    batch, multipliers = with_zeros(batch, multipliers, ridge)
    weighted = torch.einsum("kc,bpc->bkpc", mode3_rows(batch, multipliers), factors.up)
    design = weighted.flatten(1, 2)  # (b, kp, rho)
    assume(well_conditioned(design))
    target = batch.slices.flatten(1, 2)  # (b, kp, q)
    expected = torch.linalg.lstsq(design, target, driver="gelsd").solution
    assert_close(design @ updated.down, design @ expected, rtol=0, atol=1e-6)
    assert updated.up is factors.up


def test_well_conditioned_updates_equal_lstsq_itself(rng):
    batch = Batch(normal(rng, 2, 4, 12, 11), (3, 2), (0, 1))
    factors, multipliers = random_factors(rng, batch), normal(rng, 4, 2)
    rows = mode3_rows(batch, multipliers)
    design = torch.einsum("kc,bcq->bckq", rows, factors.down).flatten(2).mT
    target = batch.slices.transpose(1, 2).flatten(2).mT
    expected = torch.linalg.lstsq(design, target).solution.mT
    assert_close(update_ups(batch, factors, multipliers).up, expected, rtol=1e-8, atol=1e-8)
    design = torch.einsum("kc,bpc->bkpc", rows, factors.up).flatten(1, 2)
    expected = torch.linalg.lstsq(design, batch.slices.flatten(1, 2)).solution
    assert_close(update_downs(batch, factors, multipliers).down, expected, rtol=1e-8, atol=1e-8)


@settings(deadline=None, max_examples=40)
@given(batches(), st.floats(0, 10))
def test_the_loss_is_the_dense_residual(drawn, outside):
    batch, factors, multipliers = drawn
    problem = problem_of((batch.slices, batch.ranks), outside=outside)
    loss = compute_statistics(problem, [factors]).loss(multipliers)
    assert_close(loss, dense_loss(problem, [factors], multipliers), rtol=1e-10, atol=1e-10)


def test_statistics_are_inner_products_summed_over_all_layers(rng):
    problem = problem_of(
        (normal(rng, 2, 3, 6, 5), (2, 1)), (normal(rng, 1, 3, 4, 8), (1, 3)), outside=2.0
    )
    factors = [random_factors(rng, batch) for batch in problem.batches]
    statistics = compute_statistics(problem, factors)
    pairs = list(zip(problem.batches, factors, strict=True))
    products = [dense_blocks(batch, f) for batch, f in pairs]
    cross = sum(
        torch.einsum("bkpq,brpq->kr", batch.slices, product)
        for (batch, _), product in zip(pairs, products, strict=True)
    )
    gram = sum(torch.einsum("brpq,bspq->rs", product, product) for product in products)
    assert statistics.energy == problem.energy
    assert_close(statistics.cross, cross)
    assert_close(statistics.gram, gram)


def test_the_statistics_of_float32_layers_are_float64(rng):
    problem = problem_of((normal(rng, 2, 3, 6, 5).float(), (2, 1)))
    factors = [random_factors(rng, problem.batches[0])]
    statistics, multipliers = compute_statistics(problem, factors), normal(rng, 3, 2)
    assert statistics.cross.dtype == statistics.gram.dtype == torch.float64
    assert_close(
        statistics.loss(multipliers), dense_loss(problem, factors, multipliers), rtol=1e-5, atol=0
    )


def test_the_loss_of_nothing_is_zero():
    nothing = Statistics(
        0.0, torch.zeros(3, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    )
    assert nothing.loss(torch.ones(3, 2)) == 0.0
    assert_close(fit_multipliers(nothing), torch.zeros(3, 2, dtype=torch.float64))


@settings(deadline=None, max_examples=40)
@given(batches(), ridges)
def test_multipliers_are_the_dense_least_squares_solution(drawn, ridge):
    batch, factors, _ = drawn
    sums = compute_statistics(problem_of((batch.slices, batch.ranks)), [factors])
    fitted = fit_multipliers(sums.with_ridge(ridge))
    design = dense_blocks(batch, factors).transpose(0, 1).flatten(1).mT  # (bpq, R)
    target = batch.slices.transpose(0, 1).flatten(1).mT  # (bpq, k)
    design = torch.cat([design, torch.diag(ridge**0.5 * design.norm(dim=0))])
    target = torch.cat([target, target.new_zeros(len(batch.ranks), target.shape[1])])
    expected = torch.linalg.lstsq(design, target, driver="gelsd").solution.mT
    assert_close(fitted, expected, rtol=1e-6, atol=1e-7)


def test_equal_blocks_share_their_multiplier_evenly(rng):
    batch = Batch(normal(rng, 1, 3, 6, 5), (1, 1), (0,))
    one = random_factors(rng, batch)
    twice = Factors(one.up[..., [0, 0]], one.down[:, [0, 0]])
    fitted = fit_multipliers(compute_statistics(problem_of((batch.slices, (1, 1))), [twice]))
    assert torch.isfinite(fitted).all()
    assert_close(fitted[:, 0], fitted[:, 1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_the_multiplier_fit_ignores_block_scales(rng, scale):
    batch = Batch(normal(rng, 1, 3, 8, 8), (2, 1), (0,))
    problem = problem_of((batch.slices, batch.ranks))
    factors = random_factors(rng, batch)
    scales = torch.tensor([1.0, 1.0, scale], dtype=torch.float64)
    scaled = Factors(factors.up * scales, factors.down)
    plain, other = (
        dense_approximation(batch, f, fit_multipliers(compute_statistics(problem, [f])))
        for f in (factors, scaled)
    )
    assert_close(other, plain, rtol=0, atol=1e-8)


@settings(deadline=None, max_examples=30)
@given(batches())
def test_each_part_of_a_sweep_lowers_the_dense_loss(drawn):
    batch, factors, multipliers = drawn
    problem = problem_of((batch.slices, batch.ranks))
    ups = update_ups(batch, factors, multipliers)
    fitted = fit_multipliers(compute_statistics(problem, [ups]))
    downs = update_downs(batch, ups, fitted)
    refitted = fit_multipliers(compute_statistics(problem, [downs]))
    losses = [
        dense_loss(problem, [f], lam)
        for f, lam in (
            (factors, multipliers),
            (ups, multipliers),
            (ups, fitted),
            (downs, fitted),
            (downs, refitted),
        )
    ]
    assert all(b <= a + 1e-7 for a, b in itertools.pairwise(losses))
    swept, lam, sums = sweep(problem, [factors], multipliers)
    assert_close(sums.loss(lam), dense_loss(problem, swept, lam), rtol=0, atol=1e-6)


def test_updates_change_none_of_their_arguments(rng):
    batch = Batch(normal(rng, 2, 3, 6, 5), (2, 1), (0, 1))
    factors, multipliers = random_factors(rng, batch), normal(rng, 3, 2)
    parts = (batch.slices, factors.up, factors.down, multipliers)
    before = [part.clone() for part in parts]
    sweep(problem_of((batch.slices, batch.ranks)), [factors], multipliers)
    for part, old in zip(parts, before, strict=True):
        assert torch.equal(part, old)


def test_mixtures_are_weighted_sums_of_slices(rng):
    batch, multipliers = Batch(normal(rng, 2, 3, 6, 5), (2, 1), (0, 1)), normal(rng, 3, 2)
    expected = torch.einsum("kr,bkpq->brpq", multipliers, batch.slices)
    assert_close(batch.mixtures(multipliers), expected)


@settings(deadline=None, max_examples=20)
@given(small_ranks)
def test_columns_follow_the_order_of_the_ranks(ranks):
    batch = Batch(torch.zeros(1, 2, 9, 9), tuple(ranks), (0,))
    columns = [r for r, rank in enumerate(ranks) for _ in range(rank)]
    assert batch.block_of.tolist() == columns
    assert [list(range(sum(ranks)))[span] for span in batch.spans] == [
        [i for i, at in enumerate(columns) if at == r] for r in range(len(ranks))
    ]
    up, down = torch.arange(sum(ranks)).expand(1, 9, -1), torch.zeros(1, sum(ranks), 9)
    shapes = [(u.shape[2], d.shape[1]) for u, d in split_blocks(batch, Factors(up, down))]
    assert shapes == [(rank, rank) for rank in ranks]


def test_orthogonal_multipliers_start_blocks_as_mixture_svds(rng):
    spectrum = 0.5 ** torch.arange(8.0).double()
    mixtures = [with_spectrum(rng, 8, 8, spectrum) for _ in range(2)]
    turn = orthogonal(rng, 3, 2) * torch.tensor([2.0, 0.5], dtype=torch.float64)
    problem = problem_of((torch.einsum("kr,rpq->kpq", turn, torch.stack(mixtures))[None], (2, 3)))
    (factors,) = initial_factors(problem, turn, rng)
    products = dense_blocks(problem.batches[0], factors)[0]
    for product, mixture, rank in zip(products, mixtures, (2, 3), strict=True):
        assert torch.linalg.matrix_rank(product) == rank
        error, best = float((mixture - product).square().sum()), tail(mixture, rank)
        assert best * (1 - 1e-9) <= error <= 1.1 * best


def test_equal_multipliers_start_blocks_from_one_shared_svd(rng):
    """Starts that repeat each other leave equations singular: the loss once went to 1 from there."""
    matrix = with_spectrum(rng, 8, 8, 0.2 ** torch.arange(8.0).double())
    problem = problem_of((matrix[None, None], (2, 1)))
    ones = torch.ones(1, 2, dtype=torch.float64)
    (factors,) = initial_factors(problem, ones, rng)
    error = float((matrix - dense_blocks(problem.batches[0], factors)[0].sum(0)).square().sum())
    assert tail(matrix, 3) * (1 - 1e-9) <= error <= 1.1 * tail(matrix, 3)
