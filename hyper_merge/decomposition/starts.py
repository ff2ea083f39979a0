"""Where the joint solver starts: many multipliers tried on few layers, the best kept.

The loss has many local minima, and only the multipliers (k x R numbers) couple the layers: given
them every layer is a problem of its own. So the search for a good basin runs on the few layers that
hold most of the energy, by successive halving, and all layers join from the winner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hyper_merge.decomposition.greedy import leading_multipliers, solve_greedy
from hyper_merge.decomposition.ll1 import (
    Batch,
    Factors,
    Solution,
    Stopping,
    factors_from,
    fit_multipliers,
    solve,
    statistics,
)

_RANDOM: Final = 6  # random starts beside the planned ones
_ROUNDS: Final = ((5, 4), (10, 2), (25, 1))  # sweeps, how many go on
_PILOT_SHARE: Final = 0.06  # of the cores' entries
_PILOT_ENTRIES: Final = 4_000_000  # problems smaller than this are searched whole


@dataclass(frozen=True, eq=False)
class _Candidate:
    factors: tuple[Factors, ...]
    multipliers: Tensor  # (k, R)
    loss: float


def best_start(
    batches: Sequence[Batch],
    planned: Sequence[Tensor],  # each (k, any), columns are directions
    generator: torch.Generator,
    check: Callable[[], None] = lambda: None,
) -> Tensor:  # (k, R), float64
    """Multipliers of the best solution found on the pilot layers.

    Args:
        batches: all layers; `pilot` chooses among them.
        planned: starts worth trying (private blocks, earlier solutions), extended or cut to R.
        generator: for the random starts.
        check: called after every sweep; may raise, to stop.
    """
    energy = sum(float(batch.slices.double().square().sum()) for batch in batches)
    stop = Stopping(0, 0.0, lambda loss: check())
    tried = [_greedy_candidate(batches, energy, generator, stop)]
    for multipliers in _directions(batches, planned, generator):
        tried.append(_Candidate(factors_from(batches, multipliers, generator), multipliers, 0.0))
    for sweeps, kept in _ROUNDS:
        stopping = Stopping(sweeps, 0.0, stop.on_sweep)
        tried = [_improved(batches, candidate, energy, stopping) for candidate in tried]
        tried = sorted(tried, key=lambda candidate: candidate.loss)[:kept]
    return tried[0].multipliers


def pilot(batches: Sequence[Batch]) -> list[Batch]:
    """The layers with the most energy per entry of their cores, up to a small share of all."""
    sizes, energies, places = [], [], []
    for b, batch in enumerate(batches):
        energy = batch.slices.flatten(1).double().square().sum(1).cpu()
        sizes += [batch.slices[0, 0].numel()] * len(energy)
        energies.append(energy)
        places += [(b, i) for i in range(len(energy))]
    size = torch.tensor(sizes, dtype=torch.float64)
    budget = max(_PILOT_SHARE * float(size.sum()), _PILOT_ENTRIES)
    order = (torch.cat(energies) / size).argsort(descending=True, stable=True)
    count = max(int((size[order].cumsum(0) <= budget).sum()), 1)
    chosen = [places[i] for i in order[:count].tolist()]
    picks = [(batch, sorted(i for at, i in chosen if at == b)) for b, batch in enumerate(batches)]
    return [
        Batch(batch.slices[indices], batch.ranks, tuple(batch.layers[i] for i in indices))
        for batch, indices in picks
        if indices
    ]


def _directions(
    batches: Sequence[Batch],
    planned: Sequence[Tensor],
    generator: torch.Generator,
) -> list[Tensor]:  # each (k, R)
    """Planned and random multipliers, unit columns; random columns fill up short ones."""
    k, count = batches[0].slices.shape[1], len(batches[0].ranks)
    eigenvectors = leading_multipliers(batches)
    starts = [eigenvectors, *planned] + [eigenvectors[:, :0]] * (_RANDOM if k > 1 else 0)
    filled = []
    for start in starts:
        noise = torch.randn((k, count), generator=generator, dtype=torch.float64)
        columns = torch.cat([start.double(), noise], 1)[:, :count]
        filled.append(columns / columns.norm(dim=0).clamp(min=1e-30))
    return filled


def _greedy_candidate(
    batches: Sequence[Batch], energy: float, generator: torch.Generator, stop: Stopping
) -> _Candidate:
    greedy: Solution = solve_greedy(batches, energy, generator, Stopping(6, 0.0, stop.on_sweep))
    multipliers = fit_multipliers(statistics(batches, greedy.factors, energy))
    return _Candidate(greedy.factors, multipliers, greedy.loss)


def _improved(
    batches: Sequence[Batch], candidate: _Candidate, energy: float, stopping: Stopping
) -> _Candidate:
    found = solve(batches, candidate.factors, candidate.multipliers, energy, stopping)
    return _Candidate(found.factors, found.multipliers, found.loss)
