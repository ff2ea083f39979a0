"""Where the joint solver starts: many multipliers tried on few layers, the best kept.

The loss has many local minima, and only the multipliers (k x R numbers) couple the layers: given
them every layer is a problem of its own. So the search for a good basin runs on the few layers that
hold most of the energy, by successive halving, and all layers join from the winner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from hyper_merge.decomposition.greedy import leading_multipliers, solve_greedy
from hyper_merge.decomposition.ll1 import (
    Batch,
    Problem,
    Solution,
    Stopping,
    factors_from,
    fit_multipliers,
    solve,
    statistics,
)

_RANDOM: Final = 6  # random starts beside the planned ones
_ROUNDS: Final = ((4, 4), (6, 2), (10, 1))  # sweeps, how many go on
_GREEDY_TURNS: Final = 6
_PILOT_SHARE: Final = 0.06  # of the cores' entries
_PILOT_ENTRIES: Final = 4_000_000  # problems smaller than this are searched whole


def best_start(
    problem: Problem,
    planned: Sequence[Tensor],  # each (k, any), columns are directions
    earlier: Sequence[Tensor],  # the same, of earlier solutions
    generator: torch.Generator,
    check: Callable[[], None] = lambda: None,
) -> Tensor:  # (k, R), float64
    """Multipliers of the best solution found on the pilot layers.

    Args:
        problem: all layers; few are chosen among them.
        planned: starts worth trying (private blocks), extended or cut to R.
        earlier: solutions for other ranks; they take the place of random starts.
        generator: for the random starts.
        check: called after every sweep; may raise, to stop.
    """
    few = pilot(problem)
    greedy = solve_greedy(few, generator, Stopping(_GREEDY_TURNS, 0.0, lambda _loss: check()))
    refitted = fit_multipliers(statistics(few, greedy.factors))
    tried = [Solution(greedy.factors, refitted, greedy.losses)]
    starts = [*planned, *earlier] if earlier else [*planned, *_random_starts(few)]
    tried += [
        Solution(factors_from(few, multipliers, generator), multipliers, ())
        for multipliers in _directions(few, starts, generator)
    ]
    for sweeps, kept in _ROUNDS:
        stopping = Stopping(sweeps, 0.0, lambda _loss: check())
        tried = [solve(few, start.factors, start.multipliers, stopping) for start in tried]
        tried = sorted(tried, key=lambda found: found.loss)[:kept]
    return tried[0].multipliers


def search_effort(entries: int) -> float:
    """How many sweeps over all layers the search is worth, for cores of so many entries."""
    share = min(max(_PILOT_SHARE, _PILOT_ENTRIES / entries), 1.0)
    sweeps, tried = _GREEDY_TURNS, _RANDOM + 3  # greedy, eigenvectors, private blocks
    for more, kept in _ROUNDS:
        sweeps += more * tried
        tried = min(kept, tried)
    return share * sweeps


def pilot(problem: Problem) -> Problem:
    """The layers with the most energy per entry of their cores, up to a small share of all."""
    sizes: list[int] = []
    energies, places = [], []
    for b, batch in enumerate(problem.batches):
        energy = batch.slices.flatten(1).double().square().sum(1).cpu()
        sizes += [batch.slices[0, 0].numel()] * len(energy)
        energies.append(energy)
        places += [(b, i) for i in range(len(energy))]
    size = torch.tensor(sizes, dtype=torch.float64)
    energy = torch.cat(energies)
    budget = max(_PILOT_SHARE * float(size.sum()), _PILOT_ENTRIES)
    order = (energy / size).argsort(descending=True, stable=True)
    count = max(int((size[order].cumsum(0) <= budget).sum()), 1)
    batches = []
    for b, batch in enumerate(problem.batches):
        chosen = sorted(i for at, i in (places[o] for o in order[:count].tolist()) if at == b)
        if chosen:
            layers = tuple(batch.layers[i] for i in chosen)
            batches.append(Batch(batch.slices[chosen], batch.ranks, layers))
    return Problem(tuple(batches), float(energy[order[:count]].sum()), problem.each)


def _random_starts(problem: Problem) -> list[Tensor]:
    """Starts without columns: all of theirs will be random. One checkpoint more has one direction."""
    k, _ = problem.shape
    return [torch.zeros(k, 0)] * (_RANDOM if k > 1 else 0)


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
