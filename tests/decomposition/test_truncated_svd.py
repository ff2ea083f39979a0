"""The fast truncated SVD is as good as the full one, whatever the spectrum."""

import math

import pytest
import torch
from dense_oracles import normal, with_spectrum
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hyper_merge.decomposition.linalg import product_energy
from hyper_merge.decomposition.normalization import even_out
from hyper_merge.decomposition.truncated_svd import (
    _apart,
    _to_come,
    truncate_factors,
    truncated_svd,
    truncation_cost,
)

MODULE = "hyper_merge.decomposition.truncated_svd"
COUNT = 150
ORDER = torch.arange(1, COUNT + 1, dtype=torch.float64)
SPECTRA = {
    "flat": torch.ones(COUNT).double(),
    "slow": ORDER**-0.5,
    "power": 1 / ORDER,
    "steep": 0.9**ORDER,
    "step": torch.where(ORDER <= 6, 1.0, 0.3),
    "one": torch.where(ORDER <= 1, 1.0, 0.01),
}
SHAPES = [(90, 90), (85, 150), (140, 100)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """These matrices are too small for more, which wait for one another on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_side_is_too_small(monkeypatch):
    monkeypatch.setattr(f"{MODULE}._SMALL", 0)


def shared_and_noise(rng, m, n):
    """A few directions that fall slowly, and white noise: as differences of fine-tunes are."""
    shared = with_spectrum(rng, m, n, ORDER**-0.5)
    noise = normal(rng, m, n)
    return shared / shared.norm() + 0.4 * noise / noise.norm()


def white(rng, m, n):
    return normal(rng, m, n)


def error_of(matrix, truncated):
    return float((matrix.double() - truncated.up.double() @ truncated.down.double()).square().sum())


def least_error(matrix, rank):
    return float(torch.linalg.svdvals(matrix.double())[rank:].square().sum())


@pytest.fixture
def no_gram(monkeypatch):
    """Only the Krylov space may be used."""
    monkeypatch.setattr(f"{MODULE}._full", lambda *_: pytest.fail("the full SVD was taken"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 4, 9, 25])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*SPECTRA, "white", "shared and noise"])
def test_the_truncated_error_is_near_the_least(rng, name, shape, rank, dtype):
    makers = {"white": white, "shared and noise": shared_and_noise}
    matrix = (
        with_spectrum(rng, *shape, SPECTRA[name]) if name in SPECTRA else makers[name](rng, *shape)
    ).to(dtype)
    truncated = truncated_svd(matrix, rank, rng)
    least, energy = least_error(matrix, rank), float(matrix.double().square().sum())
    error = error_of(matrix, truncated)
    # A step that finds 1e-10 of the energy has found rounding errors in float32.
    assert least * (1 - 1e-9) <= error + 1e-12 * energy
    assert error <= 1.001 * least + 1e-10 * energy
    assert_close(float(truncated.energies.sum()) + error, energy, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(110, 90), (90, 110)])
def test_truncated_factors_are_balanced_in_falling_order(rng, no_gram, shape):
    matrix = with_spectrum(rng, *shape, SPECTRA["power"]).float()
    truncated = truncated_svd(matrix, 6, rng)
    assert (truncated.up.shape, truncated.down.shape) == ((shape[0], 6), (6, shape[1]))
    values = truncated.energies.sqrt()
    assert_close(values, SPECTRA["power"][:6], rtol=1e-3, atol=0)
    for gram in (truncated.up.mT @ truncated.up, truncated.down @ truncated.down.mT):
        assert_close(gram.double(), torch.diag(values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("planted", [3, 9])
def test_a_low_rank_matrix_is_exact_without_wasted_steps(rng, no_gram, planted, dtype):
    matrix = (normal(rng, 120, planted) @ normal(rng, planted, 100)).to(dtype)
    costs = []
    truncated = truncated_svd(matrix, 9, rng, costs.append)
    scale = float(matrix.abs().max())
    assert_close(truncated.up @ truncated.down, matrix, rtol=0, atol=2e-5 * scale)
    assert len(costs) == 2  # the second finds nothing


def test_equal_singular_values_are_all_captured(rng, no_gram):
    spectrum = torch.where(ORDER <= 25, 1.0, 0.0)
    matrix = with_spectrum(rng, 140, 140, spectrum).float()
    assert error_of(matrix, truncated_svd(matrix, 25, rng)) <= 1e-9 * 25


def test_the_space_stays_orthonormal_where_nothing_new_is_left(rng):
    matrix = (normal(rng, 120, 5) @ normal(rng, 5, 120)).float()
    basis = torch.linalg.qr(matrix[:, :60].double() + 1e-9 * normal(rng, 120, 60))[0].float()
    columns = _apart(matrix[:, :20], basis)
    joined = torch.cat([basis, columns], 1)
    assert_close(joined.mT @ joined, torch.eye(80), rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (100, 80)])
@pytest.mark.parametrize("more", [0, 50])
def test_full_rank_is_exact(rng, shape, more):
    matrix = normal(rng, *shape)
    truncated = truncated_svd(matrix, min(shape) + more, rng)
    assert truncated.up.shape == (shape[0], min(shape))
    assert_close(truncated.up @ truncated.down, matrix, rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", [7, 100])
def test_zeros_stay_zeros(rng, side):
    truncated = truncated_svd(torch.zeros(side, side + 1), 4, rng)
    assert_close(truncated.up @ truncated.down, torch.zeros(side, side + 1), rtol=0, atol=0)
    assert float(truncated.energies.sum()) == 0


def test_a_truncated_svd_is_repeatable_and_leaves_its_matrix(rng):
    matrix = normal(rng, 90, 100).float()
    before = matrix.clone()
    one, other = (truncated_svd(matrix, 8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.up, other.up)
    assert torch.equal(one.down, other.down)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("side", [30, 140])
def test_costs_are_reported_and_an_exception_ends_the_work(rng, side):
    matrix = with_spectrum(rng, side, side, SPECTRA["slow"]).float()
    costs = []
    truncated_svd(matrix, 9, rng, costs.append)
    assert 0.3 < sum(costs) / truncation_cost(side, side, 9) < 3

    def stop(_cost):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        truncated_svd(matrix, 9, rng, stop)


def test_the_expected_gain_is_a_geometric_series():
    gains = [0.5**step for step in range(60)]
    held = [math.fsum(gains[:count]) for count in (3, 4, 5)]
    assert _to_come(held) == pytest.approx(math.fsum(gains) - held[-1], rel=1e-9)
    assert _to_come([1.0, 1.0, 1.0]) == 0


@pytest.mark.parametrize("rank", [1, 4, 9, 30])
def test_a_shortened_product_loses_exactly_the_singular_tail(rng, rank):
    up, down = normal(rng, 30, 9), normal(rng, 9, 20)
    truncated = truncate_factors(up, down, rank)
    tail = least_error(up @ down, rank)
    assert error_of(up @ down, truncated) == pytest.approx(tail, rel=1e-9, abs=1e-20)
    assert float(truncated.energies.sum()) == pytest.approx(
        float((up @ down).square().sum()) - tail
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_even_factors_have_the_same_product_and_equal_lengths(m, r, n, seed):
    rng = torch.Generator().manual_seed(seed)
    up, down = 1e6 * normal(rng, m, r), 1e-6 * normal(rng, r, n)
    one, other = even_out(up, down)
    assert_close(one @ other, up @ down)
    assert_close(one.norm(dim=0), other.norm(dim=1))


def test_factors_of_nothing_are_evened_to_nothing(rng):
    up, down = normal(rng, 4, 2), normal(rng, 2, 3)
    up[:, 0] = 0
    down[1] = 0
    one, other = even_out(up, down)
    assert bool(one.isfinite().all() & other.isfinite().all())
    assert_close(one @ other, torch.zeros(4, 3).double(), rtol=0, atol=0)


def test_a_products_energy_is_the_dense_one(rng):
    up, down = normal(rng, 7, 3), normal(rng, 3, 5)
    assert product_energy(up, down) == pytest.approx(float((up @ down).square().sum()), rel=1e-12)
