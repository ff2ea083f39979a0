import pytest
import torch
from dense_oracles import normal, tail, with_spectrum
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hyper_merge.decomposition import linalg
from hyper_merge.decomposition.linalg import (
    leading_factors,
    orthonormal,
    random_normal,
    solve_damped,
)

sizes = st.integers(1, 7)


def assert_orthonormal(basis, atol=1e-12):
    eye = torch.eye(basis.shape[-1], dtype=basis.dtype).expand(*basis.shape[:-2], -1, -1)
    assert_close(basis.mT @ basis, eye, rtol=0, atol=atol)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 3), max_size=2), sizes, st.integers(0, 5), st.integers(0, 99))
def test_a_basis_is_orthonormal_and_holds_its_columns(batch, r, more, seed):
    columns = normal(torch.Generator().manual_seed(seed), *batch, r + more, r)
    basis = orthonormal(columns)
    assert basis.shape == columns.shape
    assert_orthonormal(basis)
    assert_close(basis @ (basis.mT @ columns), columns, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("overlap", [1.0, 0.1, 1e-3, 1e-6, 0.0])
def test_a_basis_of_almost_dependent_columns_is_orthonormal(rng, dtype, overlap):
    columns = normal(rng, 2, 20, 4).to(dtype)
    columns[..., 3] = columns[..., 0] + overlap * columns[..., 3]
    basis = orthonormal(columns)
    assert_orthonormal(basis, 100 * torch.finfo(dtype).eps)
    assert_close(basis @ (basis.mT @ columns), columns, rtol=0, atol=1e3 * torch.finfo(dtype).eps)


def test_a_basis_of_columns_of_any_scale_is_orthonormal(rng):
    columns = normal(rng, 12, 4) * torch.tensor([1e-200, 1e100, 1.0, 1e-5], dtype=torch.float64)
    assert_orthonormal(orthonormal(columns))


@pytest.mark.parametrize("zeros", [slice(None), slice(1, 3)])
def test_a_basis_of_zero_columns_is_orthonormal(rng, zeros):
    columns = normal(rng, 2, 9, 4)
    columns[..., zeros] = 0
    assert_orthonormal(orthonormal(columns))


def test_a_basis_is_made_without_changing_its_columns(rng):
    columns = normal(rng, 9, 4)
    before = columns.clone()
    orthonormal(columns)
    assert torch.equal(columns, before)


@settings(deadline=None, max_examples=30)
@given(sizes, sizes, st.integers(1, 3), st.integers(0, 99))
def test_a_damped_solution_solves_well_conditioned_equations(p, r, batch, seed):
    rng = torch.Generator().manual_seed(seed)
    root = normal(rng, batch, r, r)
    gram = root @ root.mT + torch.eye(r, dtype=torch.float64)
    expected = normal(rng, batch, p, r)
    solution = solve_damped(expected @ gram, gram, normal(rng, batch, p, r))
    assert_close(solution, expected, rtol=1e-8, atol=1e-8)


def test_a_damped_solution_stays_along_singular_directions(rng):
    basis = torch.linalg.qr(normal(rng, 5, 5))[0]
    known, free = basis[:, :3], basis[:, 3:]
    gram, expected, previous = known @ known.mT, normal(rng, 4, 5), normal(rng, 4, 5)
    solution = solve_damped(expected @ gram, gram, previous)
    # Rounding divided by the damping: a few per cent at most.
    assert_close(solution @ known, expected @ known, rtol=0, atol=0.1)
    assert_close(solution @ free, previous @ free, rtol=0, atol=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_solution_of_singular_equations_stays_one(rng, dtype):
    """Or else the loss would rise from where blocks overlap."""
    known = torch.linalg.qr(normal(rng, 5, 3))[0].to(dtype)
    gram, previous = known @ known.mT, normal(rng, 4, 5).to(dtype)
    solution = solve_damped(previous @ gram, gram, previous)
    # relative to rounding, not to rounding over damping
    assert_close(solution @ known, previous @ known, rtol=0, atol=100 * torch.finfo(dtype).eps)


def test_rounding_that_makes_a_matrix_indefinite_is_damped_away(rng):
    """As that of a thousand columns does, a quarter of which depend on the others."""
    basis = torch.linalg.qr(normal(rng, 2, 5, 5))[0]
    known = basis[..., :3].float()
    signs = torch.tensor([0.0, -1e-3])[:, None, None]  # the first of the batch is as it should be
    gram = known @ known.mT + signs * (basis @ basis.mT).float()
    expected, previous = normal(rng, 2, 4, 5).float(), torch.zeros(2, 4, 5)
    solution = solve_damped(expected @ gram, gram, previous)
    assert_close(solution @ known, expected @ known, rtol=0, atol=0.05)
    alone = solve_damped(expected[:1] @ gram[:1], gram[:1], previous[:1])
    assert torch.equal(solution[:1], alone)


def test_a_matrix_that_is_no_gram_matrix_is_refused(rng):
    with pytest.raises(torch.linalg.LinAlgError):
        solve_damped(normal(rng, 2, 3), torch.full((3, 3), torch.nan).double(), normal(rng, 2, 3))


def test_a_damped_solution_without_equations_stays(rng):
    previous = normal(rng, 2, 4, 3)
    zero = torch.zeros(2, 3, 3, dtype=torch.float64)
    assert_close(solve_damped(torch.zeros_like(previous), zero, previous), previous)


def test_leading_factors_approximate_the_truncated_svd(rng):
    matrix = torch.stack(
        [with_spectrum(rng, 20, 14, 0.5 ** torch.arange(14.0).double()) for _ in range(3)]
    )
    up, down = leading_factors(matrix, 4, rng)
    assert (up.shape, down.shape) == ((3, 20, 4), (3, 4, 14))
    assert_orthonormal(up)
    error = float((matrix - up @ down).square().sum())
    best = tail(matrix, 4)
    assert best * (1 - 1e-9) <= error <= 1.1 * best


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("rank", [6, 50])
def test_leading_factors_of_full_rank_are_exact(rng, shape, rank):
    matrix = normal(rng, 2, *shape)
    up, down = leading_factors(matrix, rank, rng)
    assert up.shape == (2, shape[0], 6)
    assert_close(up @ down, matrix, rtol=0, atol=1e-10)


def test_leading_factors_of_zeros_are_zero_and_finite(rng):
    up, down = leading_factors(torch.zeros(2, 6, 5), 2, rng)
    assert_close(up @ down, torch.zeros(2, 6, 5))
    assert torch.isfinite(up).all()


def test_random_numbers_follow_the_seed_and_not_the_type():
    draws = [
        random_normal((3, 4), torch.zeros(1, dtype=dtype), torch.Generator().manual_seed(5))
        for dtype in (torch.float32, torch.float64)
    ]
    assert [draw.dtype for draw in draws] == [torch.float32, torch.float64]
    assert torch.equal(draws[0].double(), draws[1])
    assert_close(draws[0], torch.randn(3, 4, generator=torch.Generator().manual_seed(5)))


def test_dependent_columns_that_rounding_hides_give_an_orthonormal_basis():
    """Of five columns in four dimensions one depends on the others, at times by a pivot above the least."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        columns = torch.zeros(8, 5)
        columns[:4] = torch.randn(4, 5, generator=generator)
        basis = orthonormal(columns)
        torch.testing.assert_close(basis.mT @ basis, torch.eye(5), atol=1e-4, rtol=0)


def test_inner_products_in_pieces_are_those_in_one(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows, others = (torch.randn(count, 1001, generator=generator) for count in (3, 2))
    exact = rows.double() @ others.double().mT
    for step in (2**22, 16 * 100, 16):
        monkeypatch.setattr(linalg, "_AT_ONCE", step)
        assert_close(linalg.inner_products(rows, others), exact)
        expected = float(rows[0].double().square().sum())
        assert linalg.squared_norm(rows[0]) == pytest.approx(expected, rel=1e-5)
