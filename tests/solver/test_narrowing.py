"""Narrow cores after the pruning: what they hold, and what the sweeps in them leave."""

import pytest
import torch
from torch.testing import assert_close

from hyper_merge.decomposition.ll1 import StoppingCriterion, compute_statistics, solve_ll1
from hyper_merge.decomposition.problem import Batch, Factors, Problem
from hyper_merge.solver.narrowing import narrow
from hyper_merge.solver.rank_pruning import GroupSolution

RANKS = (14, 6)


@pytest.fixture
def group() -> GroupSolution:
    """Blocks of rank 20 in cores of 96 x 80, beside noise; rows in no order."""
    generator = torch.Generator().manual_seed(3)
    up = torch.randn(1, 96, sum(RANKS), generator=generator)
    down = torch.randn(1, sum(RANKS), 80, generator=generator)
    multipliers = torch.tensor([[1.0, 0.3], [-0.4, 1.0], [0.2, 0.5]], dtype=torch.float64)
    noise = 0.5 * torch.randn(1, 3, 96, 80, generator=generator)
    blocks = torch.stack([up[:, :, :14] @ down[:, :14], up[:, :, 14:] @ down[:, 14:]], 1)
    slices = torch.einsum("cr,brpq->bcpq", multipliers.float(), blocks) + noise
    start = Factors(up + 0.3 * torch.randn(up.shape, generator=generator), down)
    problem = Problem((Batch(slices, RANKS, (0,)),), float(slices.square().sum()))
    return GroupSolution("all", problem, multipliers, (start,), ())


def test_narrow_cores_hold_the_blocks(group: GroupSolution) -> None:
    """Losses between narrow bases are those between wide ones, but for the cores' rounding."""
    narrowed = narrow(group, group.factors, map)
    assert narrowed.is_narrower
    assert narrowed.group.problem.batches[0].slices.shape == (1, 3, 32, 32)
    (back,) = narrowed.widened(narrowed.group.factors, map)
    (start,) = group.factors
    assert_close(back.up @ back.down, start.up @ start.down, rtol=1e-4, atol=1e-3)
    wide, slim = (
        compute_statistics(x.problem, x.factors).loss(group.multipliers)
        for x in (group, narrowed.group)
    )
    assert slim == pytest.approx(wide, rel=3e-4)


def test_what_is_beside_the_blocks_helps_the_sweeps(group: GroupSolution) -> None:
    """Sweeps in narrow cores and one in the wide ones end where wide sweeps end."""
    sweeps = StoppingCriterion(12, 0.0)
    wide = solve_ll1(group.problem, group.factors, group.multipliers, sweeps)
    narrowed = narrow(group, group.factors, map)
    slim = solve_ll1(
        narrowed.group.problem, narrowed.group.factors, group.multipliers, StoppingCriterion(11, 0)
    )
    last = solve_ll1(
        group.problem,
        narrowed.widened(slim.factors, map),
        slim.multipliers,
        StoppingCriterion(1, 0.0),
    )
    assert last.loss == pytest.approx(wide.loss, rel=2e-3)
    assert last.loss < slim.loss


def test_cores_that_are_narrow_already_stay(group: GroupSolution) -> None:
    """A core that is hardly wider than its ranks is not touched."""
    (batch,) = group.problem.batches
    (start,) = group.factors
    small = Batch(batch.slices[:, :, :32, :36].contiguous(), RANKS, (0,))
    problem = Problem((small,), float(small.slices.square().sum()))
    factors = Factors(start.up[:, :32], start.down[:, :, :36])
    rest = GroupSolution("all", problem, group.multipliers, (), ())
    narrowed = narrow(rest, (factors,), map)
    assert not narrowed.is_narrower
    assert narrowed.group.problem.batches[0] is small
    (wide,) = narrowed.widened((factors,), map)
    assert wide.up is factors.up


def test_narrow_cores_take_half_of_their_bytes(group: GroupSolution) -> None:
    """Whatever their size, no entry of note is lost in half precision."""
    (batch,) = group.problem.batches
    for scale in (1e-9, 1.0, 1e9):
        scaled = Problem((Batch(batch.slices * scale, RANKS, (0,)),), 1.0)
        narrowed = narrow(
            GroupSolution("all", scaled, group.multipliers, (), ()), group.factors, map
        )
        (slim,) = narrowed.group.problem.batches
        assert not isinstance(slim.source, torch.Tensor)
        held = [x for x in slim.source.args if isinstance(x, torch.Tensor)]
        largest = max(held, key=torch.Tensor.numel)
        assert (largest.dtype, largest.numel()) == (torch.float16, slim.slices.numel())
        left, right = narrowed.sides[0].left, narrowed.sides[0].right
        assert left is not None
        assert right is not None
        exact = left.mT[:, None] @ scaled.batches[0].slices @ right[:, None]
        assert_close(slim.slices, exact, rtol=1e-3, atol=1e-5 * float(exact.abs().max()))
