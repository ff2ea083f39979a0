import pytest
import torch
from dense_oracles import normal, with_spectrum
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hyper_merge.decomposition.compression import compress, project


def squeeze(slices, width, seed=0):
    flat = slices.double().flatten(1)
    return compress(slices, flat @ flat.mT, width, torch.Generator().manual_seed(seed))


def energy(tensor):
    return float(tensor.double().square().sum())


def restored(layer):
    return layer.left @ layer.core @ layer.right.mT


def power_law(rng, k, m, n, power=1.0):
    spectrum = torch.arange(1, 200, dtype=torch.float64) ** -power
    return torch.stack([with_spectrum(rng, m, n, spectrum) for _ in range(k)])


def test_width_that_covers_everything_changes_nothing(rng):
    slices = normal(rng, 3, 8, 6)
    compressed = squeeze(slices, 8)
    assert torch.equal(compressed.left, torch.eye(8, dtype=torch.float64))
    assert torch.equal(compressed.right, torch.eye(6, dtype=torch.float64))
    assert torch.equal(compressed.core, slices)


@pytest.mark.parametrize("shape", [(3, 5, 40), (3, 40, 5), (1, 30, 12), (3, 18, 5)])
def test_bases_that_hold_every_row_or_column_are_exact(rng, shape):
    slices = normal(rng, *shape)
    compressed = squeeze(slices, 15)
    assert compressed.core.shape == (shape[0], min(shape[1], 15), min(shape[2], 15))
    assert_close(restored(compressed), slices, rtol=0, atol=1e-11)


def test_complete_float32_bases_lose_only_half_rounding(rng):
    slices = normal(rng, 3, 5, 40).float()
    error = energy(restored(squeeze(slices, 15)) - slices) / energy(slices)
    assert error < 1e-6


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 4), st.integers(1, 14), st.integers(1, 14), st.integers(8, 16), st.integers(0, 9)
)
def test_a_core_is_exactly_the_projection_of_its_slices(k, m, n, width, seed):
    slices = normal(torch.Generator().manual_seed(seed), k, m, n)
    compressed = squeeze(slices, width)
    assert compressed.left.shape == (m, min(m, width))
    assert compressed.right.shape == (n, min(n, width))
    for basis in (compressed.left, compressed.right):
        eye = torch.eye(basis.shape[1], dtype=torch.float64)
        assert_close(basis.mT @ basis, eye, rtol=0, atol=1e-11)
    dense = torch.einsum("mp,kmn,nq->kpq", compressed.left, slices, compressed.right)
    assert_close(compressed.core, dense, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(3, 40, 30), (3, 30, 40), (2, 60, 8), (2, 8, 60)])
def test_a_float32_core_projects_on_half_precision_bases(rng, shape):
    slices = normal(rng, *shape).float()
    compressed = squeeze(slices, 12)
    assert compressed.core.dtype == torch.float32
    assert torch.equal(compressed.left, compressed.left.half().float())
    assert torch.equal(compressed.right, compressed.right.half().float())
    dense = torch.einsum(
        "mp,kmn,nq->kpq", compressed.left.double(), slices.double(), compressed.right.double()
    )
    assert_close(compressed.core.double(), dense, rtol=1e-5, atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.data())
def test_a_projection_is_two_matrix_products(k, m, n, data):
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    slices = normal(rng, k, m, n)
    left, right = (  # as `compress` makes them, square ones are the identity
        torch.linalg.qr(normal(rng, size, data.draw(st.integers(1, max(size - 1, 1)))))[0]
        if size > 1 and data.draw(st.booleans())
        else torch.eye(size, dtype=torch.float64)
        for size in (m, n)
    )
    dense = torch.einsum("mp,kmn,nq->kpq", left, slices, right)
    assert_close(project(slices, left, right), dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize(("power", "share"), [(0.5, 0.82), (1.0, 0.92), (2.0, 0.99)])
def test_bases_hold_almost_the_most_possible(rng, power, share, width):
    slices = power_law(rng, 3, 60, 50, power)
    left = torch.linalg.svd(slices.transpose(0, 1).flatten(1))[0][:, :width]
    rows = left.mT @ slices
    right = torch.linalg.svd(rows.flatten(0, 1))[2][:width].mT
    best = energy(rows @ right)  # the sequentially truncated HOSVD
    held = energy(squeeze(slices, width).core)
    assert share * best <= held <= energy(slices)


def test_wide_layers_keep_the_shorter_side_whole(rng):
    slices = power_law(rng, 3, 10, 80)
    compressed = squeeze(slices, 20)
    assert torch.equal(compressed.left, torch.eye(10, dtype=torch.float64))
    assert compressed.core.shape == (3, 10, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 40, 30), (3, 5, 40), (3, 4, 4)])
def test_zero_slices_have_zero_cores_without_nan(dtype, shape):
    compressed = squeeze(torch.zeros(shape, dtype=dtype), 12)
    assert compressed.core.count_nonzero() == 0
    assert torch.isfinite(compressed.left).all()
    assert torch.isfinite(compressed.right).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slices_of_low_rank_are_held_whole(rng, dtype):
    slices = (normal(rng, 3, 40, 2) @ normal(rng, 3, 2, 30)).to(dtype)
    error = energy(restored(squeeze(slices, 24)) - slices) / energy(slices)
    assert error < (1e-6 if dtype == torch.float32 else 1e-20)


def test_one_nonzero_slice_among_zeros_is_held(rng):
    slices = torch.zeros(3, 40, 30, dtype=torch.float64)
    slices[1] = normal(rng, 40, 3) @ normal(rng, 3, 30)
    compressed = squeeze(slices, 12)
    assert_close(restored(compressed), slices, rtol=0, atol=1e-10)


def test_compression_follows_its_seed_alone(rng):
    slices = normal(rng, 3, 40, 30).float()
    first, again, other = squeeze(slices, 12), squeeze(slices, 12), squeeze(slices, 12, seed=1)
    assert torch.equal(first.left, again.left)
    assert torch.equal(first.right, again.right)
    assert torch.equal(first.core, again.core)
    assert not torch.equal(first.left, other.left)


def test_the_order_of_slices_does_not_matter(rng):
    scale = torch.tensor([3.0, 1.0, 0.3], dtype=torch.float64)[:, None, None]
    slices = power_law(rng, 3, 40, 30) * scale
    permutation = [2, 0, 1]
    compressed, permuted = squeeze(slices, 12), squeeze(slices[permutation], 12)
    for a, b in ((compressed.left, permuted.left), (compressed.right, permuted.right)):
        assert_close(a @ a.mT, b @ b.mT, rtol=0, atol=1e-8)
    assert_close(restored(compressed)[permutation], restored(permuted), rtol=0, atol=1e-8)


def best_energy(slices, width):
    """Returns the energy in bases of this width by a sequentially truncated HOSVD."""
    left = torch.linalg.svd(slices.transpose(0, 1).flatten(1))[0][:, :width]
    rows = left.mT @ slices
    return energy(rows @ torch.linalg.svd(rows.flatten(0, 1))[2][:width].mT)


@pytest.mark.parametrize("shape", [(3, 60, 50), (2, 40, 70), (3, 80, 9)])
@pytest.mark.parametrize(("power", "share"), [(0.5, 0.78), (1.0, 0.84), (2.0, 0.96)])
def test_the_first_columns_are_bases_of_a_smaller_width(rng, shape, power, share):
    slices = power_law(rng, *shape, power)
    compressed = squeeze(slices, 32)
    for width in (4, 8, 16):
        p, q = (
            size if basis.shape[1] == size else width
            for size, basis in zip(shape[1:], (compressed.left, compressed.right), strict=True)
        )
        core = compressed.core[:, :p, :q]
        dense = compressed.left[:, :p].mT @ slices @ compressed.right[:, :q]
        assert_close(core, dense, rtol=0, atol=1e-11)
        assert share * best_energy(slices, width) <= energy(core) <= energy(slices)


@pytest.mark.parametrize("shape", [(3, 60, 50), (3, 80, 9)])
def test_later_columns_hold_less(rng, shape):
    slices = power_law(rng, *shape, 1.0)
    compressed = squeeze(slices, 32)
    columns = compressed.core.square().sum((0, 2))
    eighths = [float(part.sum()) for part in columns.tensor_split(8)]
    assert eighths == sorted(eighths, reverse=True)
    assert eighths[0] > 10 * eighths[-1]


@pytest.mark.parametrize("shape", [(3, 60, 50), (3, 80, 9)])
def test_slices_of_low_rank_lie_in_as_many_columns(rng, shape):
    slices = normal(rng, shape[0], shape[1], 2) @ normal(rng, shape[0], 2, shape[2])
    compressed = squeeze(slices, 32)
    whole = compressed.right.shape[1] == shape[2]
    core = compressed.core[:, :6] if whole else compressed.core[:, :6, :6]
    assert energy(core) == pytest.approx(energy(slices), rel=1e-12)
    assert energy(compressed.core[:, :4]) < 0.999 * energy(slices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_slices_share_their_bases(rng, dtype):
    one = power_law(rng, 1, 40, 30, 1.0)[0].to(dtype)
    slices = one.expand(3, 40, 30).contiguous()
    compressed = squeeze(slices, 16)
    values = torch.linalg.svdvals(one.double()).square()
    # All of the width, 8 columns twice by two iterates, goes to the one direction that there is.
    assert energy(compressed.core) > 3 * 0.999 * float(values[:8].sum())
    assert_close(compressed.core[0], compressed.core[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2])
def test_iterates_that_stand_still_leave_orthonormal_bases(rng, dtype, rank):
    slices = (normal(rng, 2, 50, rank) @ normal(rng, 2, rank, 40)).to(dtype)
    compressed = squeeze(slices, 24)
    for basis in (compressed.left, compressed.right):
        assert bool(basis.isfinite().all())
        gram = (basis.mT @ basis).double()
        eye = torch.eye(24, dtype=torch.float64)
        tolerance = 2e-3 if dtype == torch.float32 else 1e-11  # rounded to half precision
        assert_close(gram, eye, rtol=0, atol=tolerance)
    error = energy(restored(compressed) - slices) / energy(slices)
    assert error < (1e-6 if dtype == torch.float32 else 1e-20)
