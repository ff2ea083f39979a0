"""Where the joint solver starts: many multipliers tried on few layers, the best kept.

The loss has many local minima, and only the multipliers (k x R numbers) couple the layers: given
them every layer is a problem of its own. So the search for a good basin runs on the few layers that
hold most of the energy, by successive halving, and all layers join from the winner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

from hyper_merge.decomposition.greedy import leading_multipliers, solve_greedy
from hyper_merge.decomposition.ll1 import (
    Batch,
    Problem,
    Solution,
    StoppingCriterion,
    compute_statistics,
    fit_multipliers,
    initial_factors,
    solve_ll1,
)

_RANDOM: Final = 6  # random starts beside the planned ones
_ROUNDS: Final = ((4, 4), (6, 2), (10, 1))  # sweeps, how many go on
_GREEDY_TURNS: Final = 6
_PILOT_SHARE: Final = 0.03  # of the work of a sweep
_PILOT_ENTRIES: Final = 1_000_000  # problems smaller than this are searched whole
_BEFORE: Final = 24  # sweeps over the pilot that take as long as what precedes the first of them


def best_start(
    problem: Problem,
    planned: Sequence[Tensor],  # each (k, any), columns are directions
    earlier: Sequence[Tensor],  # the same, of earlier solutions
    generator: torch.Generator,
    tell: Callable[[float], None] = lambda _fraction: None,
    given: Sequence[Tensor] = (),  # each (k, R)
) -> Tensor:  # (k, R), float64
    """Multipliers of the best solution found on the pilot layers.

    Args:
        problem: all layers; few are chosen among them.
        planned: starts worth trying (private blocks), extended or cut to R.
        earlier: solutions for other ranks; they take the place of random starts.
        generator: for the random starts.
        tell: called after every sweep with the fraction of the sweeps that is done; may raise, to
            stop.
        given: the user's own, tried besides all others, which stay the same.
    """
    slices, blocks = problem.shape
    if slices == 1:  # two checkpoints differ in one direction: there is nothing to choose
        tell(1.0)
        return torch.ones((1, blocks), dtype=torch.float64)
    few = pilot(problem)
    starts = [*planned, *(earlier or [torch.zeros(slices, 0)] * _RANDOM)]
    sweeps_in_all = _pilot_sweeps(len(starts) + len(given))
    done: list[float] = []

    def on_sweep(cost: float, _loss: float) -> None:
        done.append(cost)
        tell(sum(done) / sweeps_in_all)

    stopping = StoppingCriterion(_GREEDY_TURNS, 0.0, partial(on_sweep, _BEFORE / blocks))
    greedy = solve_greedy(few, generator, stopping)
    refitted = fit_multipliers(compute_statistics(few, greedy.factors))
    tried = [Solution(greedy.factors, refitted, greedy.losses)]
    tried += [
        Solution(initial_factors(few, multipliers, generator), multipliers, ())
        for multipliers in _directions(few, starts, generator)
    ]
    dice = torch.Generator().manual_seed(len(starts))
    tried += [
        Solution(initial_factors(few, multipliers, dice), multipliers, ()) for multipliers in given
    ]
    for sweeps, kept in _ROUNDS:
        stopping = StoppingCriterion(sweeps, 0.0, partial(on_sweep, 1.0))
        tried = [solve_ll1(few, start.factors, start.multipliers, stopping) for start in tried]
        tried = sorted(tried, key=lambda found: found.loss)[:kept]
    return tried[0].multipliers


def search_cost(entries: float, starts: int) -> float:
    """What `best_start` takes, in sweeps over all layers.

    Args:
        entries: of one slice of every layer's core, added up.
        starts: planned, earlier or random, and given ones.
    """
    share = max(_PILOT_SHARE, _PILOT_ENTRIES / entries)
    return 1.0 + min(share, 1.0) * _pilot_sweeps(starts)  # all cores are read once


def pilot(problem: Problem) -> Problem:
    """The layers with the most energy per entry of their cores, up to a small share of the work."""
    sizes: list[int] = []
    ranks: list[int] = []
    energies, places = [], []
    for b, (batch, energy) in enumerate(
        zip(problem.batches, problem.each(_energies, problem.batches), strict=True)
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
    share = max(_PILOT_SHARE, _PILOT_ENTRIES / float(size.sum()))
    order = (energy / size).argsort(descending=True, stable=True)
    count = max(int((work[order].cumsum(0) <= share * float(work.sum())).sum()), 1)
    batches = []
    for b, batch in enumerate(problem.batches):
        chosen = sorted(i for at, i in (places[o] for o in order[:count].tolist()) if at == b)
        if chosen:
            layers = tuple(batch.layers[i] for i in chosen)
            batches.append(Batch(batch.slices[chosen], batch.ranks, layers))
    return Problem(tuple(batches), float(energy[order[:count]].sum()), problem.each, problem.ridge)


def _pilot_sweeps(starts: int) -> float:
    """What the search takes on the pilot layers, in sweeps over them."""
    tried, sweeps = starts + 2, float(_BEFORE)  # greedy deflation and eigenvectors too
    for each, kept in _ROUNDS:
        sweeps += tried * each
        tried = min(tried, kept)
    return sweeps


def _energies(batch: Batch) -> Tensor:  # (b,), float64, CPU
    return batch.slices.flatten(1).double().square().sum(1).cpu()


def _directions(
    problem: Problem,
    planned: Sequence[Tensor],
    generator: torch.Generator,
) -> list[Tensor]:  # each (k, R)
    """Planned and random multipliers, unit columns; random columns fill up short ones."""
    k, count = problem.shape
    eigenvectors = leading_multipliers(problem)
    filled = []
    for start in (eigenvectors, *planned):
        noise = torch.randn((k, count), generator=generator, dtype=torch.float64)
        columns = torch.cat([start.double(), noise], 1)[:, :count]
        filled.append(columns / columns.norm(dim=0).clamp(min=1e-30))
    return filled
