"""Sensitivities from sketches are those of dense second moments of the gradients."""

import pytest
import torch
from torch.testing import assert_close

from hyper_merge.decomposition.sensitivity import (
    DIRECTIONS,
    SensitivitySketch,
    sketching_matrix,
)

M, N, OUTPUTS = 60, 90, 7


def gradients(count=12, noise=0.02, seed=0):
    """Yields gradients of few strong directions on both sides, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(M, 5, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(N, 5, generator=generator))[0]
    sizes = torch.tensor([9.0, 5, 3, 2, 1])
    for _ in range(count):
        inner = sizes[:, None] * torch.randn(5, 5, generator=generator) * sizes
        yield left @ inner @ right.mT + noise * torch.randn(M, N, generator=generator)


def sketched(matrices, m=M, n=N):
    """Returns the sensitivity of a layer with these gradients, two inputs at a time."""
    sketch = SensitivitySketch((sketching_matrix(m), sketching_matrix(n)))
    for pair in zip(*[iter(matrices)] * 2, strict=True):
        u, s, vh = torch.linalg.svd(torch.stack(pair), full_matrices=False)
        sketch.add(s[..., None] * vh, u.mT)  # as many positions as the rank
    return sketch.sensitivity(OUTPUTS)


def test_the_mean_is_that_of_squared_gradients_by_output_and_entry():
    total = sum(float(g.double().square().sum()) for g in gradients())
    assert sketched(gradients()).mean == pytest.approx(total / (OUTPUTS * M * N), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_stretches_are_roots_of_the_dense_second_moments(side):
    sensitivity = sketched(gradients())
    rows = [g.double() if side == "left" else g.double().mT for g in gradients()]
    moment = sum(g @ g.mT for g in rows)
    relative = moment / moment.trace() * len(moment)  # over its mean eigenvalue
    stretch = getattr(sensitivity, side)
    both = {"left": sensitivity.right, "right": sensitivity.left}[side]
    rest_of_other = _rest(both, {"left": N, "right": M}[side])
    square = (sensitivity.rest / rest_of_other) * torch.linalg.matrix_power(
        stretch.apply(torch.eye(len(moment)).double()), 2
    )
    assert float((square - relative).norm() / relative.norm()) < 2e-3
    assert len(stretch.factors) == DIRECTIONS
    assert float(stretch.factors.min()) >= 1


def _rest(stretch, size):
    """Returns the level of the directions that are not stretched, for a mean of 1 over all."""
    return size / (size - len(stretch.factors) + float(stretch.factors.square().sum()))


def test_a_metric_foretells_what_changes_of_the_weight_do():
    """For gradients whose moments are a Kronecker product, it is exact in the mean."""
    generator = torch.Generator().manual_seed(5)
    left, right = (
        torch.linalg.qr(torch.randn(n, n, generator=generator))[0] * sizes
        for n, sizes in (
            (20, torch.tensor([6.0] * 4 + [1.0] * 16)),
            (30, torch.tensor([4.0] * 3 + [0.5] * 27)),
        )
    )
    many = [left @ torch.randn(20, 30, generator=generator) @ right.mT for _ in range(400)]
    sensitivity = sketched(many, 20, 30)
    scale = sensitivity.mean * sensitivity.rest * OUTPUTS
    for _ in range(3):
        change = torch.randn(20, 30, generator=generator)
        effect = sum(float((g * change).sum()) ** 2 for g in many)
        stretched = sensitivity.right.apply(sensitivity.left.apply(change).mT)
        assert scale * float(stretched.square().sum()) == pytest.approx(effect, rel=0.35)


def test_few_rows_are_known_whole():
    small = [
        torch.diag(torch.tensor([3.0, x])) @ torch.ones(2, 4) + torch.eye(2, 4) for x in (1, 2)
    ]
    sensitivity = sketched(small, 2, 4)
    assert sensitivity.left.directions.shape == (2, 2)
    assert torch.isfinite(sensitivity.left.factors).all()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_gradients_without_finite_numbers_stretch_nothing(value):
    sketch = SensitivitySketch((sketching_matrix(M), sketching_matrix(N)))
    sketch.add(torch.full((1, 3, N), value), torch.full((1, 3, M), value))
    sensitivity = sketch.sensitivity(OUTPUTS)
    assert sensitivity.left.changes_nothing
    assert sensitivity.right.changes_nothing
    assert sensitivity.mean == pytest.approx(value, nan_ok=True)


def test_sketching_matrices_are_the_same_each_time():
    assert_close(sketching_matrix(40), sketching_matrix(40), rtol=0, atol=0)
    assert sketching_matrix(3).shape == (3, 3)
