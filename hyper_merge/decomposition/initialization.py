"""Finds a start for the joint solver: tries many multipliers on few layers and keeps the best.

The loss has many local minima, and only the multipliers (k x R numbers) couple the layers: given
them every layer is a problem of its own. So the search for a good basin runs on the few layers that
hold most of the energy, by successive halving, and all layers join from the winner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final

import torch
from torch import Tensor

from hyper_merge.decomposition.greedy import leading_multipliers, solve_greedy
from hyper_merge.decomposition.ll1 import (
    Solution,
    StoppingCriterion,
    compute_statistics,
    fit_multipliers,
    initial_factors,
    solve_ll1,
)
from hyper_merge.decomposition.problem import Batch, Problem

_BEFORE: Final = 24  # sweeps over the pilot that take as long as what precedes the first of them


@dataclass(frozen=True)
class SearchEffort:
    """How thorough the search for a start is.

    Attributes:
        random_starts: Random starts that are tried in addition to the planned ones.
        rounds: Sweeps over the pilot layers in each round, and how many starts survive it.
        greedy_turns: Turns for each block of the greedy start.
        pilot_share: Work of a sweep over the pilot layers, as a share of one over all layers.
        pilot_entries: Entries of the cores up to which a problem is searched whole.
    """

    random_starts: int
    rounds: tuple[tuple[int, int], ...]
    greedy_turns: int
    pilot_share: float
    pilot_entries: int

    FULL: ClassVar[SearchEffort]
    QUICK: ClassVar[SearchEffort]

    def pilot_sweeps(self, starts: int) -> float:
        """Returns what the search takes on the pilot layers, in sweeps over them."""
        candidates, sweeps = starts + 2, float(_BEFORE)  # greedy deflation and eigenvectors too
        for round_sweeps, survivors in self.rounds:
            sweeps += candidates * round_sweeps
            candidates = min(candidates, survivors)
        return sweeps

    def pilot_part(self, entries: float) -> float:
        """Returns the share of a sweep's work that the pilot layers may take; may be above 1.

        Args:
            entries: of one slice of every layer's core, added up.
        """
        return max(self.pilot_share, self.pilot_entries / entries)


SearchEffort.FULL = SearchEffort(6, ((4, 4), (6, 2), (10, 1)), 6, 0.03, 1_000_000)
SearchEffort.QUICK = SearchEffort(1, ((1, 1),), 1, 0.03, 20_000)


def best_start(
    problem: Problem,
    planned: Sequence[Tensor],  # (k, any) per start, columns are directions
    earlier: Sequence[Tensor],  # (k, any) per start
    generator: torch.Generator,
    effort: SearchEffort = SearchEffort.FULL,
    on_progress: Callable[[float], None] = lambda _fraction: None,
    user_starts: Sequence[Tensor] = (),  # (k, R) per start
) -> Tensor:  # (k, R), float64
    """Returns the multipliers of the best solution on the pilot layers.

    Args:
        problem: all layers; few are chosen among them.
        planned: starts worth trying (private blocks), extended or cut to R.
        earlier: solutions for other ranks; they take the place of random starts.
        generator: for the random starts.
        effort: how thorough the search is.
        on_progress: called after every sweep with the fraction of the sweeps that is done; may
            raise, to stop.
        user_starts: starts that the caller adds; the other starts stay the same with them.
    """
    slices, blocks = problem.shape
    if slices == 1:  # two checkpoints differ in one direction: there is nothing to choose
        on_progress(1.0)
        return torch.ones((1, blocks), dtype=torch.float64)
    few = pilot(problem, effort)
    starts = [*planned, *(earlier or [torch.zeros(slices, 0)] * effort.random_starts)]
    all_sweeps = effort.pilot_sweeps(len(starts) + len(user_starts))
    done: list[float] = []

    def on_sweep(cost: float, _loss: float) -> None:
        done.append(cost)
        on_progress(sum(done) / all_sweeps)

    stopping = StoppingCriterion(effort.greedy_turns, 0.0, partial(on_sweep, _BEFORE / blocks))
    greedy = solve_greedy(few, generator, stopping)
    refitted = fit_multipliers(compute_statistics(few, greedy.factors))
    candidates = [Solution(greedy.factors, refitted, greedy.losses)]
    candidates += [
        Solution(initial_factors(few, multipliers, generator), multipliers, ())
        for multipliers in _directions(few, starts, generator)
    ]
    # A stream of its own: the other starts and all that follows stay the same.
    user_generator = torch.Generator().manual_seed(len(starts))
    candidates += [
        Solution(initial_factors(few, multipliers, user_generator), multipliers, ())
        for multipliers in user_starts
    ]
    for sweeps, survivors in effort.rounds:
        stopping = StoppingCriterion(sweeps, 0.0, partial(on_sweep, 1.0))
        candidates = [solve_ll1(few, c.factors, c.multipliers, stopping) for c in candidates]
        candidates = sorted(candidates, key=lambda solution: solution.loss)[:survivors]
    return candidates[0].multipliers


def mixed_start(
    gram: Tensor,  # (d, d), float64, of the slices
    private: Tensor,  # (d, k): directions of the single checkpoints
    blocks: int,
) -> Tensor:  # (d, R), unit columns
    """Returns a start of both kinds: directions that all share, then single checkpoints.

    The first half are the leading eigenvectors. The others are the checkpoints of which these leave
    most.
    """
    count = min(blocks - blocks // 2, private.shape[1])
    shared = torch.linalg.eigh(gram)[1].flip(1)[:, : blocks - count]
    rest = private - shared @ (shared.mT @ private)
    left = (rest * (gram @ rest)).sum(0)
    chosen = left.argsort(descending=True, stable=True)[: blocks - shared.shape[1]]
    start = torch.cat([shared, private[:, chosen]], 1)
    filled = torch.zeros(len(gram), blocks, dtype=torch.float64)
    filled[:, : start.shape[1]] = start
    return torch.nn.functional.normalize(filled, dim=0)


def search_cost(entries: float, starts: int, effort: SearchEffort = SearchEffort.FULL) -> float:
    """Returns what `best_start` takes, in sweeps over all layers.

    Args:
        entries: of one slice of every layer's core, added up.
        starts: number of planned, earlier or random, and user's starts.
        effort: how thorough the search is.
    """
    part = min(effort.pilot_part(entries), 1.0)
    return 1.0 + part * effort.pilot_sweeps(starts)  # all cores are read once


def pilot(problem: Problem, effort: SearchEffort = SearchEffort.FULL) -> Problem:
    """Returns the layers with the most energy per entry, up to the effort's share of the work."""
    sizes: list[int] = []
    ranks: list[int] = []
    energies, places = [], []
    for b, (batch, energy) in enumerate(
        zip(problem.batches, problem.parallel(_energies, problem.batches), strict=True)
    ):
        sizes += [batch.slices[0, 0].numel()] * len(energy)
        ranks += [sum(batch.ranks)] * len(energy)
        energies.append(energy)
        places += [(b, i) for i in range(len(energy))]
    size = torch.tensor(sizes, dtype=torch.float64)
    energy = torch.cat(energies)
    # Where ranks are adaptive the layers with most energy have the largest, and a sweep over them
    # takes by far more than one over as many entries of others.
    work = size * torch.tensor(ranks)
    part = effort.pilot_part(float(size.sum()))
    ranking = (energy / size).argsort(descending=True, stable=True)
    count = max(int((work[ranking].cumsum(0) <= part * float(work.sum())).sum()), 1)
    batches = []
    for b, batch in enumerate(problem.batches):
        chosen = sorted(i for at, i in (places[o] for o in ranking[:count].tolist()) if at == b)
        if chosen:
            layers = tuple(batch.layers[i] for i in chosen)
            batches.append(Batch(batch.slices[chosen], batch.ranks, layers))
    return Problem(
        tuple(batches), float(energy[ranking[:count]].sum()), problem.parallel, problem.ridge
    )


def _energies(batch: Batch) -> Tensor:  # (b,), float64, CPU
    return batch.slices.flatten(1).double().square().sum(1).cpu()


def _directions(
    problem: Problem,
    planned: Sequence[Tensor],
    generator: torch.Generator,
) -> list[Tensor]:  # (k, R) per start
    """Returns planned and random multipliers, unit columns; random columns fill up short ones."""
    k, count = problem.shape
    eigenvectors = leading_multipliers(problem)
    filled = []
    for start in (eigenvectors, *planned):
        noise = torch.randn((k, count), generator=generator, dtype=torch.float64)
        columns = torch.cat([start.double(), noise], 1)[:, :count]
        filled.append(columns / columns.norm(dim=0).clamp(min=1e-30))
    return filled
