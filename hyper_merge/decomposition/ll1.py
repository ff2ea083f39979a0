"""Solves the coupled block-term decomposition: blocks `up @ down` per layer, one multiplier matrix.

Minimises  sum over layers of  sum_c || slices[c] - sum_r multipliers[c, r] * up_r @ down_r ||^2,
the decomposition in rank-(L, L, 1) terms of De Lathauwer ("Decompositions of a higher-order tensor
in block terms, part II", 2008), coupled over layers through the mode-3 factor: the multipliers.
Every half-step of the alternating least squares (ALS) here is linear and lowers the loss.

There may be no best blocks: large ones that almost cancel each other come ever closer to the slices
(de Silva and Lim, "Tensor rank and the ill-posedness of the best low-rank approximation problem",
2008). A `ridge` adds that fraction of the blocks' own energies, ||multipliers[:, r]||^2 *
||up_r @ down_r||^2, to what is minimised, which keeps them from it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hyper_merge.decomposition.factored_batch import SweptTogether
from hyper_merge.decomposition.linalg import leading_factors, moved, solve_damped
from hyper_merge.decomposition.problem import Batch, Factors, Keep, Problem


@dataclass(frozen=True, eq=False)
class Statistics:
    """Inner products from which multipliers and loss follow; float64, on the CPU."""

    energy: float  # sum of squares of all slices, in and outside of the cores
    cross: Tensor  # (k, R), <slices[c], block_r> summed over layers
    gram: Tensor  # (R, R), <block_r, block_s> summed over layers

    def loss(
        self,
        multipliers: Tensor,  # (k, R)
    ) -> float:
        """Returns the squared error as a fraction of the energy (0 for no energy).

        ||X - Y||^2 = ||X||^2 - 2 <X, Y> + ||Y||^2.
        """
        lam = multipliers.double().cpu()
        error = self.energy - 2 * (lam * self.cross).sum() + ((lam @ self.gram) * lam).sum()
        return max(float(error), 0.0) / self.energy if self.energy > 0 else 0.0

    def with_ridge(self, ridge: float) -> Statistics:
        """Returns statistics that count the blocks' own energies: a sweep lowers their loss."""
        return Statistics(self.energy, self.cross, _with_ridge(self.gram, ridge))


@dataclass(frozen=True, eq=False)
class Solution:
    """Blocks with their multipliers, and how the loss came down."""

    factors: tuple[Factors, ...]  # one per batch
    multipliers: Tensor  # (k, R), float64
    losses: tuple[float, ...]  # after each sweep, fractions of the energy

    @property
    def loss(self) -> float:
        """Fraction of the energy that is not explained."""
        return self.losses[-1]


@dataclass(frozen=True)
class StoppingCriterion:
    """When to stop sweeping, and what to call after every sweep."""

    sweeps: int
    tolerance: float  # relative change in one sweep of what is minimised
    on_sweep: Callable[[float], None] = lambda _loss: None  # may raise, to stop


def update_ups(
    batch: Batch,
    factors: Factors,
    multipliers: Tensor,  # (k, R)
    mixtures: Tensor | None = None,  # (b, R, p, q), if known
    inner: Tensor | None = None,  # (b, rho, rho), of the downs, if they reach beyond the core
    ridge: float = 0.0,
) -> Factors:
    """Returns the best ups for these downs and multipliers: normal equations of all blocks."""
    # Through mixtures of the slices the work does not grow with the number of checkpoints.
    mixtures = batch.mixtures(multipliers) if mixtures is None else mixtures
    parts = [mixtures[:, r] @ factors.down[:, s].mT for r, s in enumerate(batch.spans)]
    inner = factors.down @ factors.down.mT if inner is None else inner
    gram = _mode3_gram(batch, multipliers, ridge) * inner
    return Factors(solve_damped(torch.cat(parts, 2), gram, factors.up), factors.down)


def update_downs(
    batch: Batch,
    factors: Factors,
    multipliers: Tensor,  # (k, R)
    mixtures: Tensor | None = None,  # (b, R, p, q), if known
    inner: Tensor | None = None,  # (b, rho, rho), of the ups, if known
    ridge: float = 0.0,
) -> Factors:
    """Returns the best downs for these ups and multipliers."""
    mixtures = batch.mixtures(multipliers) if mixtures is None else mixtures
    parts = [mixtures[:, r].mT @ factors.up[:, :, s] for r, s in enumerate(batch.spans)]
    inner = factors.up.mT @ factors.up if inner is None else inner
    gram = _mode3_gram(batch, multipliers, ridge) * inner
    return Factors(factors.up, solve_damped(torch.cat(parts, 2), gram, factors.down.mT).mT)


def compute_statistics(problem: Problem, factors: Sequence[Factors]) -> Statistics:
    """Computes the inner products of slices and blocks, summed over all layers in float64."""
    return _summed(problem, list(problem.parallel(_batch_statistics, problem.batches, factors)))


def fit_multipliers(statistics: Statistics) -> Tensor:  # (k, R), float64
    """Returns the best multipliers for these blocks: normal equations, least norm if singular."""
    norms = statistics.gram.diagonal().clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
    gram = statistics.gram * norms * norms[:, None]  # of unit blocks: their scale is free
    return (statistics.cross * norms) @ torch.linalg.pinv(gram, rtol=1e-10, hermitian=True) * norms


def initial_factors(
    problem: Problem,
    multipliers: Tensor,  # (k, R)
    generator: torch.Generator,
) -> tuple[Factors, ...]:
    """Makes a start: every block is the truncated SVD of its own mixture of deviations."""
    seed = int(torch.randint(2**62, (), generator=generator))
    start = partial(_truncated_mixtures, multipliers, problem.keep)
    seeds = range(seed, seed + len(problem.batches))
    return tuple(problem.parallel(start, seeds, problem.batches))


def _truncated_mixtures(multipliers: Tensor, keep: Keep, seed: int, batch: Batch) -> Factors:
    batch = batch.loaded()
    generator = torch.Generator().manual_seed(seed)
    norms = multipliers.square().sum(0).clamp(min=torch.finfo(multipliers.dtype).tiny)
    mixtures = batch.mixtures(multipliers / norms)
    overlaps = multipliers.mT @ multipliers / norms[:, None]
    alike = overlaps * overlaps.mT > 0.99  # squared cosines
    ups: list[Tensor] = []
    downs: list[Tensor] = []
    for r, rank in enumerate(batch.ranks):
        rest = mixtures[:, r]
        for s in range(r):  # blocks of almost equal multipliers take what is left over
            if alike[r, s]:
                rest = rest - float(overlaps[r, s]) * (ups[s] @ downs[s])
        up, down = leading_factors(rest, rank, generator)
        ups.append(up)
        downs.append(down)
    return Factors(torch.cat(ups, 2), torch.cat(downs, 1)).kept(keep)


@dataclass(frozen=True, eq=False)
class _Ahead:
    """A batch's factors, from which a sweep takes a step in the direction in which they changed.

    Attributes:
        newest: The factors.
        older: Those before; the same where there are none.
        momentum: How far, in the last change.
    """

    newest: Factors
    older: Factors
    momentum: float = 0.0

    @property
    def factors(self) -> Factors:
        """Those at which the sweep begins; made by whoever sweeps, so that few are there at a time."""
        if self.momentum == 0:
            return self.newest
        up = torch.lerp(self.older.up, self.newest.up, 1 + self.momentum)
        return Factors(up, torch.lerp(self.older.down, self.newest.down, 1 + self.momentum))


def sweep(
    problem: Problem,
    factors: Iterable[Factors],  # one per batch; may be lazy
    multipliers: Tensor,  # (k, R)
) -> tuple[tuple[Factors, ...], Tensor, Statistics]:
    """Fits ups, downs and multipliers, each to the others. Returns the statistics too."""
    return _swept(problem, (_Ahead(each, each) for each in factors), multipliers)


def _swept(
    problem: Problem,
    starts: Iterable[_Ahead],  # one per batch
    multipliers: Tensor,  # (k, R)
) -> tuple[tuple[Factors, ...], Tensor, Statistics]:
    # Once for all batches: on its way to a GPU even a small tensor waits for all work there.
    multipliers = moved(multipliers, problem.batches[0].device)
    in_batch = partial(_swept_batch, multipliers, problem.ridge, problem.keep)
    results = list(problem.parallel(in_batch, problem.batches, starts))
    statistics = _summed(problem, [part for _, part in results])
    fitted = fit_multipliers(statistics.with_ridge(problem.ridge))
    return tuple(new for new, _ in results), fitted, statistics


def _swept_batch(
    multipliers: Tensor,  # (k, R)
    ridge: float,
    keep: Keep,
    batch: Batch,
    start: _Ahead,
) -> tuple[Factors, tuple[Tensor, Tensor]]:  # cross (k, R) and gram (R, R), float64
    old = start.factors
    if isinstance(batch, SweptTogether):
        new, sums = batch.swept(old, multipliers, ridge)
        return new.kept(keep), sums
    batch = batch.loaded()
    mixtures = batch.mixtures(multipliers)
    new = update_ups(batch, old, multipliers, mixtures, ridge=ridge)
    inner = new.up.mT @ new.up
    new = update_downs(batch, new, multipliers, mixtures, inner, ridge)
    return new.kept(keep), _batch_statistics(batch, new, inner)


def solve_ll1(
    problem: Problem,
    factors: Iterable[Factors],  # one per batch
    multipliers: Tensor,  # (k, R)
    stopping: StoppingCriterion,
) -> Solution:
    """Sweeps from a start until what is minimised, loss and ridge, stands still; it never rises.

    Each sweep begins a step ahead, in the direction of the last one; where that does not lower it, it
    is taken back and the next sweep is a plain one. This gets through the long valleys
    ("swamps") of alternating least squares in a half to a third of the sweeps. The multipliers in the
    end are the best for the blocks without the ridge, which makes both a little small.

    Source: Mitchell, Ye and De Sterck, "Nesterov acceleration of alternating least squares for
    canonical tensor decomposition", 2020 (with restarts by function value).
    """
    if not problem.batches:  # no layer has any rank
        return Solution((), multipliers, (float(problem.energy > 0),))
    current, before = Solution(tuple(factors), multipliers, ()), multipliers
    del factors  # a set of all layers'
    older: deque[Factors] = deque()  # those of `before`, as far as they are still needed
    values: list[float] = []  # of what is minimised
    last: Statistics | None = None
    step = 0
    for left in reversed(range(stopping.sweeps)):
        momentum = step / (step + 3)
        ahead = torch.lerp(before, current.multipliers, 1 + momentum)
        newest = deque(current.factors)
        if not step and (not values or not left):  # nothing goes back to them, or ahead from them
            current = replace(current, factors=())
        new, fitted, statistics = _swept(problem, _ahead(older, newest, momentum), ahead)
        value = statistics.with_ridge(problem.ridge).loss(fitted)
        stopping.on_sweep(value)
        if step and value > values[-1]:
            step = 0
            del new
            continue
        values.append(value)
        last = statistics
        older, before = deque(current.factors), current.multipliers
        current = Solution(new, fitted, (*current.losses, statistics.loss(fitted)))
        del new
        if _stands_still(values, stopping.tolerance):
            break
        step = step + 1 if len(values) > 1 else 0  # the start itself is no direction
    if last is None or not problem.ridge:
        return current
    free = fit_multipliers(last)
    return Solution(current.factors, free, (*current.losses[:-1], last.loss(free)))


def split_blocks(
    batch: Batch,
    factors: Factors,
) -> Iterator[tuple[Tensor, Tensor]]:  # (b, p, r), (b, r, q) per block
    """Yields the factors of each block."""
    for span in batch.spans:
        yield factors.up[:, :, span], factors.down[:, span]


def _stands_still(values: Sequence[float], tolerance: float) -> bool:
    return len(values) > 1 and values[-2] - values[-1] <= tolerance * values[-2]


def _ahead(older: deque[Factors], newest: deque[Factors], momentum: float) -> Iterator[_Ahead]:
    """Yields the newest factors with those before them.

    Lazily, and both give their factors away: two sets of all layers' are there, not four.
    """
    while newest:
        new = newest.popleft()
        yield _Ahead(new, older.popleft() if older else new, momentum)


def _summed(problem: Problem, parts: Sequence[tuple[Tensor, Tensor]]) -> Statistics:
    cross, gram = (torch.stack(part).sum(0).cpu() for part in zip(*parts, strict=True))
    return Statistics(problem.energy, cross, gram)


def _batch_statistics(
    batch: Batch,
    factors: Factors,
    inner: Tensor | None = None,  # (b, rho, rho), of the ups, if known
) -> tuple[Tensor, Tensor]:  # cross (k, R) and gram (R, R), float64
    batch = batch.loaded()
    products = torch.stack([(up @ down).flatten(1) for up, down in split_blocks(batch, factors)], 1)
    cross = (batch.slices.flatten(2) @ products.mT).double().sum(0)
    inner = factors.up.mT @ factors.up if inner is None else inner
    columns = inner * (factors.down @ factors.down.mT)
    member = torch.nn.functional.one_hot(batch.block_of, len(batch.ranks)).double()
    gram = member.mT @ columns.double().sum(0) @ member
    return cross, gram


def _with_ridge(gram: Tensor, ridge: float) -> Tensor:  # (R, R)
    return gram + ridge * torch.diag_embed(gram.diagonal())


def _mode3_gram(batch: Batch, multipliers: Tensor, ridge: float) -> Tensor:  # (rho, rho)
    gram = _with_ridge(multipliers.mT @ multipliers, ridge).to(batch.slices)
    return gram[batch.block_of][:, batch.block_of]
