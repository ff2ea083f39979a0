"""One side of a layer's blocks: in its basis, after a rounding too, and its inner products."""

import pytest
import torch

from hyper_merge.decomposition.stretch import Stretch
from hyper_merge.solver.block_sides import BlockSide, LayerSide


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def basis_of(m, p):
    """Returns a basis as a cache holds it: rounded to half precision."""
    return torch.linalg.qr(random(m, p))[0].half().float()


def coordinates(basis, columns):
    """Returns the least-squares coordinates, by another route."""
    return torch.linalg.lstsq(basis.double(), columns.double()).solution


def test_expanded_columns_lie_in_the_first_columns_of_the_basis():
    basis, within = basis_of(40, 12), random(7, 3, seed=1)
    side = BlockSide.expanded(basis, within)
    torch.testing.assert_close(side.columns, basis[:, :7] @ within)
    assert side.within.shape == (12, 3)
    torch.testing.assert_close(basis @ side.within, side.columns)


def test_rounded_columns_are_projected_as_if_all_of_them_were():
    basis = basis_of(400, 60)
    exact = BlockSide.expanded(basis, random(50, 5, seed=1))
    columns = exact.columns + 0.03 * random(400, 5, seed=2) * exact.columns
    side = exact.rounded(basis, columns)
    assert side.columns is columns
    expected = coordinates(basis, columns)
    off = (side.within - expected).norm() / expected.norm()
    assert off < 2e-6
    assert (basis.mT @ columns - expected).norm() / expected.norm() > 3 * off


@pytest.mark.parametrize("seed", [0, 1])
def test_inner_products_are_those_of_stretched_columns(seed):
    basis, directions = torch.linalg.qr(random(30, 9))[0], torch.linalg.qr(random(30, 3, seed=3))[0]
    layer = LayerSide(basis, Stretch(directions, torch.tensor([5.0, 2.0, 0.5])))
    columns = random(30, 4, seed=seed)
    inner = BlockSide(columns, basis.mT @ columns).inner(layer)
    stretched = layer.stretch.apply(columns)
    torch.testing.assert_close(inner.gram, columns.mT @ columns)
    torch.testing.assert_close(inner.weighted_gram, stretched.mT @ stretched)
    other = basis @ random(9, 2, seed=4)
    dense = layer.stretch.apply(other).mT @ stretched
    torch.testing.assert_close((basis.mT @ other).mT @ inner.dual, dense, atol=1e-4, rtol=1e-4)


def test_without_a_stretch_both_inner_products_are_the_plain_ones():
    basis, columns = basis_of(20, 6), random(20, 3)
    side = BlockSide(columns, basis.mT @ columns)
    inner = side.inner(LayerSide(basis, Stretch.none(20)))
    assert inner.dual is side.within
    assert inner.gram is inner.weighted_gram
