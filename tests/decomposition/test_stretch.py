"""Stretches are dense symmetric maps, and layer metrics are dense weighted least squares."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hyper_merge.decomposition.stretch import LayerMetric, Stretch


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stretch(size, count, seed=0, most=30.0):
    directions = torch.linalg.qr(normal(seed, size, count))[0]
    factors = 1 + (most - 1) * torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return Stretch(directions, factors.double())


def dense(side, size):
    return side.apply(torch.eye(size).double())


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 99))
def test_a_stretch_is_a_symmetric_map_with_its_factors(size, count, seed):
    side = stretch(size, min(count, size), seed)
    matrix = dense(side, size)
    assert_close(matrix, matrix.mT)
    values = torch.linalg.eigvalsh(matrix)
    expected = torch.cat([side.factors, torch.ones(size - len(side.factors)).double()])
    assert_close(values, expected.sort().values)
    assert_close(side.inverse.apply(matrix), torch.eye(size).double(), atol=1e-9, rtol=0)
    assert_close(side.root.apply(side.root.apply(torch.eye(size).double())), matrix)


@given(st.integers(2, 12), st.integers(1, 5), st.integers(1, 12), st.integers(0, 99))
def test_within_a_basis_vectors_keep_the_length_that_the_map_gives(size, count, columns, seed):
    side = stretch(size, min(count, size), seed)
    basis = torch.linalg.qr(normal(seed + 1, size, min(columns, size)))[0]
    within = Stretch.from_square(basis.mT @ side.directions, side.gains)
    x = normal(seed + 2, basis.shape[1], 4)
    assert_close(
        within.apply(x).norm(dim=0), side.apply(basis @ x).norm(dim=0), rtol=1e-5, atol=1e-6
    )


def test_a_stretch_that_changes_nothing_returns_its_input():
    columns = normal(0, 5, 3)
    assert Stretch.none(5).apply(columns) is columns
    metric = LayerMetric(1.0, Stretch.none(5), Stretch.none(3))
    assert metric.is_plain
    assert not LayerMetric(1.0, stretch(5, 1), Stretch.none(3)).is_plain


@pytest.fixture
def metric():
    return LayerMetric(0.3, stretch(7, 3, 1), stretch(5, 2, 2))


def test_a_metric_counts_errors_as_dense_matrices_do(metric):
    left, right = dense(metric.left, 7), dense(metric.right, 5)
    matrices = normal(3, 2, 7, 5)
    expected = left @ matrices @ right * 0.3**0.5
    assert_close(metric.apply(matrices), expected)
    assert_close(metric.transposed.apply(matrices.mT), expected.mT)
    assert_close(metric.scaled(4).apply(matrices), 2 * expected)


def test_factors_are_stretched_as_their_product_is(metric):
    up, down = normal(4, 7, 2), normal(5, 2, 5)
    product = metric.apply(up @ down)
    stretched = metric.apply_to_factors(up, down)
    assert_close(stretched[0] @ stretched[1], product)
    back = metric.undo(*stretched)
    assert_close(back[0] @ back[1], up @ down)
    other = normal(6, 7, 5)
    dual = metric.dual(up, down)
    assert_close((other * (dual[0] @ dual[1])).sum(), (metric.apply(other) * product).sum())


def test_numbers_keep_their_type(metric):
    matrices = normal(3, 7, 5)
    single = LayerMetric(
        0.3,
        Stretch(metric.left.directions.half(), metric.left.factors.float()),
        Stretch(metric.right.directions.half(), metric.right.factors.float()),
    )
    assert single.apply(matrices.float()).dtype == torch.float32
    assert single.apply(matrices).dtype == torch.float64
    assert_close(single.apply(matrices), metric.apply(matrices), rtol=0.02, atol=0.05)
