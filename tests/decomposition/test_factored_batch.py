"""A sweep over factors is the sweep over the slices that they make."""

from functools import partial

import torch
from torch.testing import assert_close

from hyper_merge.decomposition import factored_batch
from hyper_merge.decomposition.factored_batch import (
    FactoredBatch,
    SweptTogether,
    layers_of_one_form,
)
from hyper_merge.decomposition.ll1 import StoppingCriterion, solve_ll1, sweep
from hyper_merge.decomposition.problem import Batch, Factors, Problem

K, P, Q, RANK = 5, 20, 24, 3
RANKS = (4, 0, 3)


def form(owners):
    return (P, Q, tuple(owners.tolist()))


def problems(ridge=0.01):
    generator = torch.Generator().manual_seed(0)
    ups = torch.randn(P, K * RANK, generator=generator)
    downs = torch.randn(K * RANK, Q, generator=generator)
    owners = torch.arange(K).repeat_interleave(RANK)
    parts = [(ups[:, owners == c], downs[owners == c]) for c in range(K)]
    slices = torch.stack([up @ down for up, down in parts])[None]
    energy = float(slices.square().sum())
    dense = Batch(slices, RANKS, (0,))
    factored = FactoredBatch(
        lambda: slices, RANKS, (0,), lambda: (ups, downs), owners, form(owners)
    )
    together = SweptTogether.of([factored])
    return [Problem((batch,), energy, ridge=ridge) for batch in (dense, together)]


def start():
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(1, P, sum(RANKS), generator=generator)
    down = torch.randn(1, sum(RANKS), Q, generator=generator)
    multipliers = torch.randn(K, len(RANKS), generator=generator).double()
    return Factors(up, down), multipliers


def test_a_sweep_gives_what_the_one_over_slices_gives():
    factors, multipliers = start()
    results = [sweep(problem, [factors], multipliers) for problem in problems()]
    (one, fitted, sums), (other, refitted, others) = results
    assert_close(other[0].up @ other[0].down, one[0].up @ one[0].down, rtol=1e-3, atol=1e-3)
    assert_close(refitted, fitted, rtol=1e-3, atol=1e-4)
    assert_close(others.cross, sums.cross, rtol=1e-4, atol=1e-2)
    assert_close(others.gram, sums.gram, rtol=1e-4, atol=1e-2)


def test_a_solve_ends_with_the_loss_of_the_one_over_slices():
    factors, multipliers = start()
    stopping = StoppingCriterion(6, 0.0)
    one, other = (solve_ll1(x, [factors], multipliers, stopping) for x in problems())
    assert other.losses[0] > 1.05 * other.loss
    for first, second in zip(one.losses, other.losses, strict=True):
        assert abs(first - second) < 1e-4


def test_a_layer_with_other_ranks_keeps_its_components():
    batch = problems()[1].batches[0].layers_alone[0].of_layer(0, (1, 2, 0))
    assert batch.ranks == (1, 2, 0)
    assert batch.components()[0].shape == (P, K * RANK)


def test_layers_of_other_ranks_are_swept_together_as_alone():
    generator = torch.Generator().manual_seed(2)
    layers, starts = [], []
    for place, ranks in enumerate([(4, 0, 3), (1, 2, 2), (0, 0, 1), (3, 3, 3)]):
        ups = torch.randn(P, K * RANK, generator=generator)
        downs = torch.randn(K * RANK, Q, generator=generator)
        owners = torch.arange(K).repeat_interleave(RANK)
        source = partial(tuple, (ups, downs))
        layers.append(
            FactoredBatch(torch.zeros(1, K, P, Q), ranks, (place,), source, owners, form(owners))
        )
        up = torch.randn(1, P, sum(ranks), generator=generator)
        starts.append(Factors(up, torch.randn(1, sum(ranks), Q, generator=generator)))
    multipliers = torch.randn(K, 3, generator=generator).double()
    energy = 1e5
    one_by_one = tuple(SweptTogether.of([layer]) for layer in layers)
    alone, fitted, sums = sweep(Problem(one_by_one, energy, ridge=0.01), starts, multipliers)
    batch = SweptTogether.of(layers)
    problem = Problem((batch,), energy, ridge=0.01)
    (together,), refitted, others = sweep(problem, [batch.padded(starts)], multipliers)
    for one, other in zip(alone, batch.parts(together), strict=True):
        assert one.up.shape == other.up.shape
        assert_close(other.up @ other.down, one.up @ one.down, rtol=1e-3, atol=1e-3)
    assert_close(refitted, fitted, rtol=1e-4, atol=1e-4)
    assert_close(others.cross, sums.cross, rtol=1e-4, atol=1e-2)
    assert_close(others.gram, sums.gram, rtol=1e-4, atol=1e-2)


def test_layers_of_one_form_come_together_as_far_as_they_are_small(monkeypatch):
    monkeypatch.setattr(factored_batch, "_TOGETHER", 2 * 10 * 3)
    small, other, large = (4, 6, (0, 0, 1)), (4, 6, (0, 1, 1)), (40, 60, (0, 0, 1))
    forms = [small, other, large, small, large, small, (1, 1, ())]
    assert layers_of_one_form(forms) == [[0, 3], [1], [2], [4], [5], [6]]
