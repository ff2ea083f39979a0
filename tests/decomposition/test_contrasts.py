import pytest
import torch
from dense_oracles import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hyper_merge.decomposition.contrasts import (
    around_base,
    around_mean,
    compute_deviations,
    energies,
)

counts = st.integers(2, 6)
some_weights = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0]), min_size=2, max_size=6).filter(
    any
)


def bits(tensor):
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def dense_mean(checkpoints, weights):
    share = torch.tensor(weights, dtype=torch.float64)
    stack = torch.stack([checkpoint.double() for checkpoint in checkpoints])
    return (share / share.sum()) @ stack


def family(rng, count, size=300, dtype=torch.float32):
    base = normal(rng, size)
    return [(base + 0.1 * normal(rng, size)).to(dtype) for _ in range(count)]


@settings(deadline=None, max_examples=40)
@given(some_weights)
def test_contrasts_are_orthonormal_and_lose_nothing(weights):
    contrasts = around_mean(weights)
    k = len(weights)
    assert (contrasts.count, contrasts.dimensions) == (k, k - 1)
    basis = contrasts.to_deviations
    assert_close(basis.mT @ basis, torch.eye(k - 1, dtype=torch.float64), rtol=0, atol=1e-12)
    differences = normal(torch.Generator().manual_seed(1), k - 1, 7)
    relative = torch.cat([torch.zeros(1, 7, dtype=torch.float64), differences])
    mean = contrasts.base_weights @ differences
    assert_close(mean, dense_mean(relative, weights), rtol=0, atol=1e-12)
    assert_close(basis @ contrasts.to_slices @ differences, relative - mean, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(some_weights, st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_deviations_are_those_from_the_dense_weighted_mean(weights, dtype):
    checkpoints = family(torch.Generator().manual_seed(2), len(weights), dtype=dtype)
    contrasts = around_mean(weights)
    deviations = compute_deviations(checkpoints[0], checkpoints[1:], contrasts, torch.float32, 64)
    mean = dense_mean(checkpoints, weights)
    assert_close(deviations.base.double(), mean, rtol=1e-6, atol=1e-6)
    dense = torch.stack([checkpoint.double() for checkpoint in checkpoints]) - mean
    assert_close(contrasts.to_deviations @ deviations.slices.double(), dense, rtol=0, atol=2e-6)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_a_stored_mean_is_the_dense_one_rounded_once(rng, stored):
    checkpoints = family(rng, 3)
    deviations = compute_deviations(
        checkpoints[0], checkpoints[1:], around_mean([1, 1, 1]), stored, 64
    )
    mean = dense_mean(checkpoints, [1, 1, 1])
    assert deviations.base.dtype == stored
    assert_close(deviations.base, mean.to(stored), rtol=torch.finfo(stored).eps, atol=1e-6)
    assert (deviations.base == mean.to(stored)).double().mean() > 0.98


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.0, 1.0), (1.0, 2.0, 3.0, 4.0)])
def test_energies_include_the_stored_bases_rounding(rng, stored, weights):
    # Small deviations of large weights: the rounding error of the base is a good part of them.
    base = normal(rng, 500)
    checkpoints = [(base + 1e-3 * normal(rng, 500)).float() for _ in weights]
    contrasts = around_mean(weights)
    deviations = compute_deviations(checkpoints[0], checkpoints[1:], contrasts, stored, 100)
    assert deviations.gram.dtype == torch.float64
    dense = torch.stack([c.double() - deviations.base.double() for c in checkpoints])
    assert_close(energies(deviations.gram, contrasts), dense.square().sum(1), rtol=1e-3, atol=1e-7)


def test_a_gram_is_that_of_slices_and_rounding_error(rng):
    checkpoints = family(rng, 4)
    contrasts = around_mean([1.0] * 4)
    deviations = compute_deviations(checkpoints[0], checkpoints[1:], contrasts, torch.bfloat16, 50)
    error = deviations.base.double() - dense_mean(checkpoints, [1.0] * 4)
    rows = torch.cat([deviations.slices.double(), error[None]])
    assert_close(deviations.gram, rows @ rows.mT, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 400), counts)
def test_the_size_of_chunks_does_not_matter(chunk, count):
    checkpoints = family(torch.Generator().manual_seed(3), count)
    contrasts = around_mean([1.0] * count)
    whole, parts = (
        compute_deviations(checkpoints[0], checkpoints[1:], contrasts, torch.float16, size)
        for size in (10**6, chunk)
    )
    assert_close(parts.base, whole.base, rtol=1e-3, atol=1e-6)
    assert_close(parts.slices, whole.slices, rtol=1e-6, atol=1e-6)
    assert_close(parts.gram, whole.gram, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(some_weights, st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_equal_checkpoints_average_to_themselves_bit_for_bit(weights, dtype):
    same = normal(torch.Generator().manual_seed(4), 200).to(dtype)
    same[:8] = torch.tensor(
        [0.0, torch.finfo(dtype).max, torch.finfo(dtype).min, torch.finfo(dtype).tiny] * 2
    ).to(dtype)
    same[5:8] *= -1
    same = torch.where(same == 0, same.abs(), same)
    contrasts = around_mean(weights)
    deviations = compute_deviations(same, [same.clone() for _ in weights[1:]], contrasts, dtype, 33)
    assert torch.equal(bits(deviations.base), bits(same))
    assert deviations.slices.count_nonzero() == 0
    assert deviations.gram.count_nonzero() == 0
    assert energies(deviations.gram, contrasts).count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_negative_zeros_average_to_themselves_too(dtype, count):
    same = torch.tensor([-0.0, 0.0, -0.0, 1.0] * 50).to(dtype)
    deviations = compute_deviations(
        same, [same] * (count - 1), around_mean([1.0] * count), dtype, 33
    )
    assert torch.equal(bits(deviations.base), bits(same))


def test_checkpoints_of_different_types_are_compared_in_float32(rng):
    checkpoints = [
        part.to(dtype)
        for part, dtype in zip(
            family(rng, 3), (torch.float16, torch.bfloat16, torch.float32), strict=True
        )
    ]
    contrasts = around_mean([1.0] * 3)
    deviations = compute_deviations(checkpoints[0], checkpoints[1:], contrasts, torch.float32, 1000)
    mean = dense_mean(checkpoints, [1.0] * 3)
    dense = torch.stack([checkpoint.double() for checkpoint in checkpoints]) - mean
    assert_close(contrasts.to_deviations @ deviations.slices.double(), dense, rtol=0, atol=2e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_deviations_from_a_given_base_are_differences(rng, count):
    base, *checkpoints = family(rng, count + 1, dtype=torch.float16)
    contrasts = around_base(count)
    assert (contrasts.count, contrasts.dimensions) == (count, count)
    deviations = compute_deviations(base, checkpoints, contrasts, torch.float16, 77)
    assert torch.equal(bits(deviations.base), bits(base))
    dense = torch.stack([checkpoint.double() - base.double() for checkpoint in checkpoints])
    assert_close(contrasts.to_deviations @ deviations.slices.double(), dense, rtol=0, atol=1e-6)
    assert_close(energies(deviations.gram, contrasts), dense.square().sum(1), rtol=1e-5, atol=1e-6)


def test_energies_of_many_layers_are_those_of_each(rng):
    contrasts = around_mean([1.0, 2.0, 1.0])
    grams = []
    for _ in range(3):
        first, *others = family(rng, 3)
        grams.append(compute_deviations(first, others, contrasts, torch.float16, 64).gram)
    expected = torch.stack([energies(gram, contrasts) for gram in grams])
    assert_close(energies(torch.stack(grams), contrasts), expected)
