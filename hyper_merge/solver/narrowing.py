"""Narrows the cores to what the kept ranks need, for the many sweeps that follow the pruning.

The blocks' own span and the leading part of what is beside it lose next to nothing; the first columns
of the bases would lose much, for square bases are not ordered and others serve larger ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from hyper_merge.decomposition.linalg import orthonormal, random_normal
from hyper_merge.decomposition.problem import Batch, Factors, Keep
from hyper_merge.runtime.parallel import ParallelMap
from hyper_merge.solver.metric import COLUMNS_PER_RANK
from hyper_merge.solver.rank_pruning import GroupSolution, given_away

_STEP: Final = 16  # columns by which widths differ
_LEAST: Final = 32  # columns
_LARGEST_HALF: Final = 2.0**14  # float16 ends at 65504, and is exact to 2 ** -11 above 2 ** -14
_GAIN: Final = 0.75  # of the entries that must go: less does not pay for it


@dataclass(frozen=True, eq=False)
class _Sides:
    """Orthonormal columns between which a batch's cores lie; None for a side that stays as it is."""

    left: Tensor | None  # (b, p, w)
    right: Tensor | None  # (b, q, w)

    @property
    def change_nothing(self) -> bool:
        """Whether the cores stay as they are."""
        return self.left is None and self.right is None

    def widen(self, factors: Factors) -> Factors:
        """Returns the same blocks in the wide cores' coordinates."""
        up = factors.up if self.left is None else self.left @ factors.up
        down = factors.down if self.right is None else factors.down @ self.right.mT
        return Factors(up, down)


@dataclass(frozen=True, eq=False)
class NarrowGroup:
    """A group between narrower bases."""

    group: GroupSolution
    sides: Sequence[_Sides]  # of every batch

    @property
    def is_narrower(self) -> bool:
        """Whether any core is."""
        return not all(sides.change_nothing for sides in self.sides)

    def without_factors(self) -> tuple[NarrowGroup, Iterator[Factors]]:
        """Returns the rest of the group, and an iterator that gives the factors away one by one."""
        group, factors = self.group.without_factors()
        return replace(self, group=group), factors

    def widened(self, factors: Iterable[Factors], parallel: ParallelMap) -> Iterator[Factors]:
        """Returns an iterator of narrow blocks in the wide cores' coordinates.

        It needs the sides alone, not the narrow cores.
        """
        widen = partial(_widened, self.group.problem.keep)
        return parallel(widen, given_away(deque(self.sides)), factors)


def _widened(keep: Keep, sides: _Sides, factors: Factors) -> Factors:
    return factors if sides.change_nothing else sides.widen(factors).kept(keep)


def narrow(group: GroupSolution, factors: Iterable[Factors], parallel: ParallelMap) -> NarrowGroup:
    """Returns a group whose cores are little wider than its blocks' ranks.

    Args:
        group: what remains after the pruning.
        factors: its blocks, one by one.
        parallel: a map over the batches.
    """
    narrowed = partial(_narrowed, group.problem.keep)
    results = list(parallel(narrowed, group.problem.batches, factors))
    batches, narrow_factors, sides = zip(*results, strict=True) if results else ((), (), ())
    problem = replace(group.problem, batches=batches)
    return NarrowGroup(replace(group, problem=problem, factors=narrow_factors), sides)


def _narrowed(keep: Keep, wide: Batch, factors: Factors) -> tuple[Batch, Factors, _Sides]:
    batch = wide.loaded()
    slices = batch.slices
    rank = sum(batch.ranks)
    width = max(-(-int(COLUMNS_PER_RANK * rank) // _STEP) * _STEP, _LEAST)
    p, q = slices.shape[2:]
    if min(p, width) * min(q, width) > _GAIN * p * q:
        if not isinstance(wide.source, Tensor):
            batch = replace(wide, source=keep([slices])[0])
        return batch, factors, _Sides(None, None)
    # The order of the work does not matter: a stream of random numbers for each batch.
    generator = torch.Generator().manual_seed(batch.layers[0])
    left = right = None
    if width < p:
        left = _side(slices, factors.up, width, generator)
        slices = left.mT[:, None] @ slices
    if width < q:
        right = _side(slices.mT, factors.down.mT, width, generator)
        slices = slices @ right[:, None]
    up = factors.up if left is None else left.mT @ factors.up
    down = factors.down if right is None else factors.down @ right
    source = _compact(slices, keep)
    sides = _Sides(*(side if side is None else keep([side])[0] for side in (left, right)))
    return replace(batch, source=source), Factors(up, down).kept(keep), sides


def _compact(slices: Tensor, keep: Keep) -> Tensor | Callable[[], Tensor]:
    """Returns what makes the slices from half of their bytes; on a GPU the slices.

    All layers' are needed in every sweep. An entry is rounded by 2 ** -11 of itself at most, and
    the last sweep sees the cores as they are.
    """
    if slices.device.type != "cpu":
        return slices
    largest = slices.abs().amax().clamp(min=torch.finfo(slices.dtype).tiny)
    scale = largest / _LARGEST_HALF
    (halves,) = keep([(slices / scale).half()])
    return partial(_from_halves, halves, scale, slices.dtype)


def _from_halves(halves: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return halves.to(dtype).mul_(scale)


def _side(
    slices: Tensor,  # (b, k, p, q)
    columns: Tensor,  # (b, p, rho), rho <= width
    width: int,
    generator: torch.Generator,
) -> Tensor:  # (b, p, width), orthonormal
    """Returns a basis that holds the columns and the leading part of the rows' space beside them."""
    basis = torch.linalg.qr(columns)[0]
    spare = width - basis.shape[2]
    if not spare:
        return basis
    b, k, _, q = slices.shape
    start = random_normal((b, k, q, spare), slices, generator)
    rest = orthonormal(_beside(basis, (slices @ start).sum(1)))
    rest = (slices @ (slices.mT @ rest[:, None])).sum(1)  # a turn of subspace iteration
    return torch.linalg.qr(torch.cat([basis, _beside(basis, rest)], 2))[0]


def _beside(
    basis: Tensor,  # (b, p, r), orthonormal
    columns: Tensor,  # (b, p, any)
) -> Tensor:  # (b, p, any)
    """Returns what the columns have outside of the basis."""
    return columns - basis @ (basis.mT @ columns)
