"""Factors in 8 bits: within range whatever they are, and fitted again to what rounding has left."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_family import merge

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.decomposition.linalg import largest_value, largest_values
from hyper_merge.decomposition.normalization import balance
from hyper_merge.decomposition.stretch import LayerMetric, Stretch
from hyper_merge.errors import InterruptedRun
from hyper_merge.loras.lora_file import StoredFormat, as_hosts_apply
from hyper_merge.solver import float8
from hyper_merge.solver.block_sides import BlockSide, LayerSide
from hyper_merge.solver.float8 import RefitTarget, float8_alpha, is_in_range, rounded_and_refitted
from hyper_merge.solver.rounding import DOWNS, UPS, RoundedSide, Rounding

FLOAT8 = torch.float8_e4m3fn
LAYER = Layer("te.weight", "lora_te_q_proj", "text_encoder", (60, 50))
RANKS = (16, 12, 0, 8)
PLAIN = LayerMetric(1.0, Stretch.none(60), Stretch.none(50))
IDENTITIES = (torch.eye(60), torch.eye(50))


def generator_of(seed=0):
    return torch.Generator().manual_seed(seed)


def stretching():
    """Returns a metric that stretches some directions of both sides by up to 20."""
    generator = generator_of(3)
    left, right = (
        Stretch(torch.linalg.qr(torch.randn(n, 4, generator=generator))[0], factors)
        for n, factors in ((60, torch.tensor([9.0, 5, 3, 2])), (50, torch.tensor([20.0, 6, 2, 1])))
    )
    return LayerMetric(0.5, left, right)


def blocks_of(ranks=RANKS, seed=0):
    generator = generator_of(seed)
    return [
        balance(
            torch.randn(60, rank, generator=generator), torch.randn(rank, 50, generator=generator)
        )
        if rank
        else (torch.zeros(60, 0), torch.zeros(0, 50))
        for rank in ranks
    ]


def alphas_of(pairs):
    return [float8_alpha(up.shape[1] * largest_value(up, down)) for up, down in pairs]


def rounding_of(alphas, bases=IDENTITIES, metric=PLAIN):
    sides = tuple(
        LayerSide(basis, stretch)
        for basis, stretch in zip(bases, (metric.left, metric.right), strict=True)
    )
    return Rounding(LAYER, sides, RANKS, [StoredFormat(alpha, FLOAT8) for alpha in alphas])


def columns_of(pairs):
    """Returns the ups and the downs of all blocks as columns, side by side."""
    return torch.cat([up for up, _ in pairs], 1), torch.cat([down for _, down in pairs]).mT


def rounded(rounding, pairs):
    """Returns blocks between the bases as files hold them, without a fit."""
    return tuple(
        rounding.side(rounding.spanned(side, place), place)
        for place, side in enumerate(columns_of(pairs))
    )


def dense_error(target, rounding, sides):
    """Returns the error of the blocks as hosts add them, by its definition."""
    left, right = (side.basis.double() for side in rounding.sides)
    stored, alphas = rounding.stored_pairs(sides), [form.alpha for form in rounding.formats]
    total = 0.0
    for core, row in zip(target.slices.double(), target.multipliers, strict=True):
        rest = left @ core @ right.mT
        for pair, alpha, x in zip(stored, alphas, row.tolist(), strict=True):
            up, down = (part.double() for part in as_hosts_apply(*pair, alpha))
            rest = rest - x * up @ down
        total += float(rest.square().sum())
    return total


def cancelling(seed=0):
    """Two slices of four blocks that are ten times as large as their sum."""
    pairs = blocks_of(seed=seed)
    pairs[1] = (-pairs[0][0][:, :12].clone(), pairs[0][1][:12] + 0.3 * pairs[1][1])
    multipliers = torch.tensor([[1.0, 0.9, 0.0, 0.2], [0.95, 1.0, 0.0, -0.3]]).double()
    slices = sum(
        x.float()[:, None, None] * (up @ down)
        for x, (up, down) in zip(multipliers.mT, pairs, strict=True)
    )
    return RefitTarget(slices, multipliers), pairs


@given(size=st.floats(1e-30, 1e30))
def test_alpha_is_the_smallest_sufficient_power_of_two(size):
    alpha = float8_alpha(size)
    assert size / alpha <= 2**15
    assert size / (alpha / 2) > 2**15
    assert math.frexp(alpha)[0] == 0.5


@pytest.mark.parametrize("size", [0.0, math.inf, math.nan])
def test_a_file_without_any_size_has_the_alpha_one(size):
    assert float8_alpha(size) == 1.0


@settings(deadline=None, max_examples=40)
@given(
    rank=st.integers(1, 40),
    exponent=st.floats(-20, 10),
    decay=st.floats(0, 3),
    seed=st.integers(0, 99),
)
def test_the_largest_singular_value_is_bounded_closely_from_above(rank, exponent, decay, seed):
    values = 10.0**exponent * torch.arange(1, rank + 1).double() ** -decay
    generator = generator_of(seed)
    up = torch.linalg.qr(torch.randn(60, rank, generator=generator).double())[0]
    down = torch.linalg.qr(torch.randn(50, rank, generator=generator).double())[0].mT
    largest = largest_value(up * values, down)
    assert 0.999 * float(values[0]) < largest < rank ** (1 / 16) * float(values[0]) * 1.001


def test_largest_values_of_blocks_are_those_of_each_alone():
    pairs = blocks_of()
    up, down = torch.cat([up for up, _ in pairs], 1), torch.cat([down for _, down in pairs])
    found = largest_values(up.mT @ up, down @ down.mT, RANKS)
    alone = [largest_value(up.double(), down.double()) for up, down in pairs]
    assert found == pytest.approx(alone, rel=1e-5)
    assert found[2] == 0.0
    exact = [float(torch.linalg.matrix_norm(up @ down, 2)) for up, down in pairs]
    for value, bound in zip(exact, found, strict=True):
        assert value <= 1.0001 * bound
        assert bound <= 1.001 * 16 ** (1 / 16) * value


def test_what_is_no_number_is_in_no_range():
    rounding = rounding_of([1.0] * len(RANKS))
    columns = torch.ones(60, sum(RANKS))
    gram = columns.mT @ columns
    assert is_in_range(rounding, columns, gram, gram)
    for place in (0, -1):
        for bad in (math.nan, math.inf):
            other = gram.clone()
            other[place, place] = bad
            assert not is_in_range(rounding, columns, gram, other)
            damaged = columns.clone()
            damaged[0, place] = bad
            assert not is_in_range(rounding, damaged, gram, gram)


@pytest.mark.parametrize(("largest", "fits"), [(1e3, True), (5.9e4, True), (7e4, False)])
def test_blocks_are_in_range_as_far_as_the_largest_of_each_is(largest, fits):
    rounding = rounding_of([1.0] * len(RANKS))
    columns = torch.eye(60)[:, : sum(RANKS)] * (largest / RANKS[0] / 16 ** (1 / 16)) ** 0.5
    gram = columns.mT @ columns
    assert is_in_range(rounding, columns, gram, gram) is fits


def test_stored_blocks_hold_nothing_of_others():
    rounding = rounding_of([1.0] * len(RANKS))
    for pair, rank in zip(
        rounding.stored_pairs(rounded(rounding, blocks_of())), RANKS, strict=True
    ):
        for part, rows in zip(pair, (60, 50), strict=True):
            assert part.untyped_storage().nbytes() == rows * rank


def test_nothing_has_no_largest_singular_value():
    assert largest_value(torch.zeros(3, 2), torch.ones(2, 3)) == 0.0
    assert largest_value(torch.zeros(3, 0), torch.zeros(0, 3)) == 0.0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_refit_reduces_the_rounding_of_cancelling_blocks(seed):
    target, pairs = cancelling(seed)
    rounding = rounding_of(alphas_of(pairs))
    sides = rounded(rounding, pairs)
    again = rounded_and_refitted(target, rounding, columns_of(pairs))
    before, after = (dense_error(target, rounding, blocks) for blocks in (sides, again))
    energy = float(target.slices.double().square().sum())
    assert 1e-3 < before / energy < 0.1
    assert 0 < after < 0.7 * before
    stored = rounding.stored_pairs(again)
    assert {part.dtype for pair in stored for part in pair} == {FLOAT8}
    assert all(part.is_contiguous() for pair in stored for part in pair)
    assert [up.shape[1] for up, _ in stored] == list(RANKS)
    assert [down.shape[0] for _, down in stored] == list(RANKS)


@pytest.mark.parametrize("metric", [PLAIN, stretching()], ids=["plain", "stretched"])
def test_refitted_factors_are_dense_least_squares(metric):
    generator = generator_of(1)
    bases = [torch.linalg.qr(torch.randn(n, 20, generator=generator))[0] for n in (60, 50)]
    slices = torch.randn(2, 20, 20, generator=generator)
    multipliers = torch.randn(2, len(RANKS), generator=generator).double()
    target = RefitTarget(slices, multipliers)
    pairs = blocks_of(seed=2)  # not in the bases
    rounding = rounding_of([1.0] * len(RANKS), tuple(bases), metric)
    ups, downs = columns_of(pairs)
    sides = [
        RoundedSide(columns, columns, BlockSide(columns, layer.basis.mT @ columns), layer)
        for columns, layer in zip((ups, downs), rounding.sides, strict=True)
    ]
    former = [side.exact.within for side in sides]
    mixtures = target.batch(RANKS).mixtures(multipliers)
    dense = [(bases[0] @ core @ bases[1].mT).double() for core in slices]
    row = multipliers.repeat_interleave(torch.tensor(RANKS), 1)  # (2, rho)
    right, left = (
        side.apply(torch.eye(n)).double() for side, n in ((metric.right, 50), (metric.left, 60))
    )

    def expected(columns, slices, stretched):
        design = torch.cat([x[:, None] * columns.mT.double() @ stretched for x in row], 1)
        wide = torch.cat([block @ stretched for block in slices], 1)
        return torch.linalg.lstsq(design.mT, wide.mT).solution.mT

    # what a least-squares up has outside of the basis is nothing, for the slices are inside
    fitted = float8._fitted(rounding, target, mixtures, former[UPS], sides[DOWNS], UPS)
    found, close = fitted.columns.double(), {"atol": 2e-3, "rtol": 2e-3}
    torch.testing.assert_close(found, expected(downs, dense, right), **close)
    torch.testing.assert_close(bases[0] @ fitted.within, fitted.columns)
    fitted = float8._fitted(rounding, target, mixtures, former[DOWNS], sides[UPS], DOWNS)
    found = fitted.columns.double()
    turned = [block.mT for block in dense]
    torch.testing.assert_close(found, expected(ups, turned, left), **close)


def test_a_fit_that_leaves_the_range_is_not_made():
    target, pairs = cancelling()
    rounding = rounding_of(alphas_of(pairs))
    larger = replace(target, slices=3 * target.slices)
    again = rounded_and_refitted(larger, rounding, columns_of(pairs))
    for side, plain in zip(again, rounded(rounding, pairs), strict=True):
        assert torch.equal(side.values.view(torch.uint8), plain.values.view(torch.uint8))


def test_a_stop_is_checked_between_refits():
    target, pairs = cancelling()
    rounding, checks = rounding_of(alphas_of(pairs)), []

    def stop():
        checks.append(1)
        if len(checks) == 2:
            raise InterruptedRun("stopped")

    with pytest.raises(InterruptedRun):
        rounded_and_refitted(target, rounding, columns_of(pairs), stop)


def test_the_second_fit_heeds_how_much_each_checkpoint_counts(files, tmp_path, monkeypatch):
    def explained(**settings):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        settings = {"lora_dtype": "float8", "fit_weights": (1, 1, 100), **settings}
        return merge(files, folder, iterations=12, **settings).report.checkpoints[2].explained

    exact = explained(lora_dtype="float32")
    assert explained() > exact - 0.003
    monkeypatch.setattr(float8, "_SIDES", ())
    assert explained() < exact
