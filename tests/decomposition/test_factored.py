"""Matrices that are given as factors are compressed to what a dense SVD of their stack says."""

import pytest
import torch
from torch.testing import assert_close

from hyper_merge.decomposition.factored import compress_factors, compress_many

M, N = 40, 60


def random_pairs(*ranks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for rank in ranks:
        fall = torch.arange(1, rank + 1).float() ** -0.8
        up = torch.randn(M, rank, generator=generator) * fall
        pairs.append((up, torch.randn(rank, N, generator=generator)))
    return pairs


def stack(pairs):
    return torch.stack([up.double() @ down.double() for up, down in pairs])


@pytest.mark.parametrize("ranks", [(4, 4, 4), (5, 0, 3), (1,), (30, 30), (45, 2)])
def test_within_the_width_nothing_is_lost(ranks):
    pairs = random_pairs(*ranks)
    dense = stack(pairs)
    layer = compress_factors(pairs, (M, N), 100)
    left, right = layer.left.double(), layer.right.double()
    assert_close(left @ layer.core().double() @ right.mT, dense, atol=1e-2, rtol=0)
    energies = dense.flatten(1).square().sum(1)
    products = dense.flatten(1) @ dense.flatten(1).mT
    assert_close(layer.gram, products, rtol=0, atol=1e-3 * float(energies.max()))
    assert_close(layer.gram.diagonal(), energies, rtol=1e-5, atol=0)
    for row, matrix in zip(layer.spectra.private, dense, strict=True):
        count = min(len(row), N, M)
        expected = torch.linalg.svdvals(matrix)[:count].square()
        assert_close(row[:count], expected, rtol=1e-4, atol=1e-4 * float(energies.max()))


def test_bases_are_ordered_singular_vectors_of_the_stack():
    pairs = random_pairs(3, 4, 5)
    layer = compress_factors(pairs, (M, N), 100)
    dense = stack(pairs)
    for basis, unfolded, values in (
        (layer.left, dense.transpose(0, 1).flatten(1), layer.spectra.rows),
        (layer.right, dense.flatten(0, 1).mT, layer.spectra.columns),
    ):
        vectors, singular, _ = torch.linalg.svd(unfolded, full_matrices=False)
        assert_close(values, singular[:12].square(), rtol=1e-4, atol=1e-4)
        overlap = (vectors[:, :12].mT @ basis.double()).abs()
        assert_close(overlap, torch.eye(12).double(), atol=2e-2, rtol=0)


@pytest.mark.parametrize("width", [1, 6, 10])
def test_narrower_bases_give_exact_projections(width):
    pairs = random_pairs(4, 4, 4, 4)
    dense = stack(pairs)
    layer = compress_factors(pairs, (M, N), width)
    assert max(layer.core_shape) <= width
    left, right = layer.left.double(), layer.right.double()
    assert_close(layer.core().double(), left.mT @ dense @ right, atol=1e-4, rtol=1e-4)
    energies = dense.flatten(1).square().sum(1)
    assert_close(layer.gram.diagonal(), energies, rtol=1e-5, atol=0)
    inside = float(layer.core().double().square().sum())
    # No worse than half of what the best bases of that width hold: those of the whole stack.
    best = torch.linalg.svdvals(dense.flatten(0, 1))[:width].square().sum()
    assert 0.5 * float(best) <= inside <= float(energies.sum())
    limit = float(layer.spectra.rows.sum())
    assert limit >= inside * (1 - 1e-4)


@pytest.mark.parametrize(
    "compress",
    [
        lambda pairs: compress_factors(pairs, (M, N), 8),
        lambda pairs: compress_many(pairs, (M, N), len),
    ],
    ids=["few", "many"],
)
def test_zero_matrices_are_no_obstacle(compress):
    pairs = [(torch.zeros(M, 3), torch.randn(3, N)), (torch.randn(M, 2), torch.zeros(2, N))]
    for given in (pairs, [(torch.zeros(M, 0), torch.zeros(0, N))] * 2):
        layer = compress(given)
        assert layer.core_shape == (1, 1)
        assert not layer.core().any()
        assert not layer.gram.any()


def test_dependent_columns_are_no_obstacle():
    (up, down), *_ = random_pairs(3)
    doubled = (torch.cat([up, up], 1), torch.cat([down, down]))
    layer = compress_factors([doubled, (up, down)], (M, N), 100)
    assert layer.core_shape == (3, 3)
    dense = stack([doubled, (up, down)])
    assert_close(
        layer.left.double() @ layer.core().double() @ layer.right.double().mT,
        dense, atol=2e-2, rtol=0,
    )  # fmt: skip


def test_many_within_the_width_lose_nothing():
    pairs = random_pairs(*[3] * 9, 0)
    dense = stack(pairs)
    layer = compress_many(pairs, (M, N), len)
    left, right = layer.left.double(), layer.right.double()
    assert_close(left @ layer.core().double() @ right.mT, dense, atol=3e-2, rtol=0)
    products = dense.flatten(1) @ dense.flatten(1).mT
    assert_close(layer.gram, products, rtol=0, atol=1e-3 * float(products.max()))
    assert layer.core_shape == (27, 27)


@pytest.mark.parametrize("size", [1e-5, 1e-7, 1e-16, 1e-20, 1e-22, 1e-41])
def test_a_matrix_that_is_next_to_nothing_is_not_lost_among_many(size):
    pairs = random_pairs(12, 12, 8)
    (up, down) = pairs[-1]
    pairs[-1] = (up * size**0.5, down * size**0.5)
    layer = compress_many(pairs, (M, N), len)
    ups, downs = layer.components()
    assert bool(layer.gram.isfinite().all())
    assert float(layer.ups.abs().max()) < 1.1
    assert float(layer.downs.abs().max()) < 1.1
    if size > 1e-38:  # which float32 tells from nothing
        left, right = layer.left.double(), layer.right.double()
        projected = left.mT @ pairs[-1][0].double() @ (pairs[-1][1].double() @ right)
        core = ups[:, 24:].double() @ downs[24:].double()
        assert_close(core, projected, rtol=0, atol=5e-3 * float(projected.abs().max()))


def test_many_beyond_the_width_keep_their_norms_and_spectra():
    pairs = random_pairs(*[4] * 10)
    dense = stack(pairs)
    seen = []

    def width_for(energies):
        seen.append(energies)
        return 12

    layer = compress_many(pairs, (M, N), width_for)
    assert layer.core_shape == (12, 12)
    assert_close(seen[0].sum(), dense.square().sum(), rtol=1e-4, atol=0)
    assert_close(layer.gram.diagonal(), dense.flatten(1).square().sum(1), rtol=1e-4, atol=0)
    expected = torch.linalg.svdvals(dense)[:, :4].square()
    assert_close(layer.spectra.private, expected, rtol=1e-3, atol=1e-3)
    projected = layer.left.double().mT @ dense @ layer.right.double()
    assert_close(layer.core().double(), projected, rtol=0, atol=3e-2)
    u, sizes, vh = torch.linalg.svd(dense, full_matrices=False)
    outside = sizes < sizes[:, :4].flatten().topk(12).values[-1] * 0.9999
    dropped = ((u * (sizes * outside)[:, None]) @ vh).flatten(1)
    expected = dense.flatten(1) @ dense.flatten(1).mT - dropped @ dropped.mT
    apart = ~torch.eye(10, dtype=torch.bool)
    atol = 1e-3 * float(expected.abs().max())
    assert_close(layer.gram[apart], expected[apart], rtol=0, atol=atol)
    # No sum of so many ranks explains more than the spectra of the bases say.
    total = float(dense.square().sum())
    unfolded = torch.linalg.svdvals(projected.transpose(0, 1).flatten(1)).square()
    assert float(layer.spectra.rows.sum()) >= 0.999 * float(unfolded.sum())
    assert float(layer.spectra.rows.sum()) <= total


def test_the_largest_components_are_told_in_their_order():
    pairs = random_pairs(*[4] * 10)
    layer = compress_many(pairs, (M, N), len)
    places = layer.largest(7)
    ups, downs = layer.components()
    energies = ups.square().sum(0) * downs.square().sum(1)
    assert places.tolist() == sorted(energies.topk(7).indices.tolist())
    up, down = layer.components(places)
    assert_close(up @ down, ups[:, places] @ downs[places])


@pytest.mark.parametrize("width", [100, 12])
def test_weighted_spectra_are_those_of_weighted_matrices(width):
    pairs = random_pairs(4, 7, 3, 5)
    weights = torch.tensor([0.5, 2.0, 0.0, 1.5], dtype=torch.float64)
    layer = compress_many(pairs, (M, N), lambda _: width)
    spectra = layer.weighted_spectra(weights)
    weighted = stack(pairs) * weights.sqrt()[:, None, None]
    for row, matrix in zip(spectra.private, weighted, strict=True):
        expected = torch.linalg.svdvals(matrix)[: len(row)].square()
        assert_close(row, expected, rtol=1e-3, atol=1e-3)
    inside = layer.left.double().mT @ weighted.transpose(0, 1).flatten(1)
    expected = torch.linalg.svdvals(inside)[: len(spectra.rows)].square()
    assert_close(spectra.rows, expected, rtol=5e-3, atol=1e-2)


def test_weighted_spectra_are_of_many_alone():
    layer = compress_factors(random_pairs(4, 4), (M, N), 100)
    with pytest.raises(ValueError, match="many"):
        layer.weighted_spectra(torch.ones(2).double())
