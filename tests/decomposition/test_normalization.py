import torch
from dense_oracles import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hyper_merge.decomposition.normalization import balance, unit_scales


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 3), max_size=1),
    st.integers(1, 5),
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(0, 99),
)
def test_balanced_factors_keep_product_and_singular_values(batch, r, more_p, more_q, seed):
    rng = torch.Generator().manual_seed(seed)
    up = normal(rng, *batch, r + more_p, r) * 1e4
    down = normal(rng, *batch, r, r + more_q) * 1e-2
    left, right = balance(up, down)
    assert (left.shape, right.shape) == (up.shape, down.shape)
    assert_close(left @ right, up @ down, rtol=1e-9, atol=1e-9)
    singular = torch.linalg.svdvals(up @ down)[..., :r]
    squares = torch.diag_embed(singular)
    assert_close(left.mT @ left, squares, rtol=1e-8, atol=1e-8)
    assert_close(right @ right.mT, squares, rtol=1e-8, atol=1e-8)


def test_balanced_zeros_are_zeros():
    left, right = balance(torch.zeros(2, 5, 3), torch.zeros(2, 3, 4))
    assert left.count_nonzero() == right.count_nonzero() == 0


def test_the_first_ranks_of_balanced_factors_are_the_best(rng):
    up, down = normal(rng, 9, 4), normal(rng, 4, 8)
    left, right = balance(up, down)
    error = (up @ down - left[:, :2] @ right[:2]).square().sum()
    assert_close(error, torch.linalg.svdvals(up @ down)[2:].square().sum())


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_unit_scales_make_the_largest_multiplier_one(k, count, seed):
    multipliers = normal(torch.Generator().manual_seed(seed), k, count)
    scaled = multipliers / unit_scales(multipliers)
    ones = torch.ones(count, dtype=torch.float64)
    assert_close(scaled.abs().amax(0), ones)
    assert_close(scaled.amax(0), ones)  # and it is positive


def test_unit_scales_leave_columns_of_zeros():
    multipliers = torch.tensor([[0.0, 2.0, 0.5], [-0.0, -4.0, 0.25]])
    assert unit_scales(multipliers).tolist() == [1.0, -4.0, 0.5]
