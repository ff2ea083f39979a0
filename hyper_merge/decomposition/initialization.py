"""Finds a start for the joint solver: tries many multipliers on few layers and keeps the best.

The loss has many local minima, and only the multipliers (k x R numbers) couple the layers: given
them every layer is a problem of its own. So the search for a good basin runs on few layers, and of
each on its leading rows and columns alone, by successive halving; all layers join from the winner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final

import torch
from torch import Tensor

from hyper_merge.decomposition.greedy import leading_multipliers, solve_greedy
from hyper_merge.decomposition.linalg import leading_factors
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
_COLUMNS_PER_RANK: Final = 1.6  # of the reduced cores: so near are ranks and cores in a real merge
_PARTS: Final = 4  # batches of the pilot, for a parallel map


@dataclass(frozen=True)
class SearchEffort:
    """How thorough the search for a start is.

    Attributes:
        random_starts: Random starts that are tried in addition to the planned ones.
        rounds: Sweeps over the pilot layers in each round, and how many starts survive it.
        greedy_turns: Turns for each block of the greedy start.
        layers: Pilot layers.
        side: Rows and columns of each that are searched.
    """

    random_starts: int
    rounds: tuple[tuple[int, int], ...]
    greedy_turns: int
    layers: int
    side: int

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
        """Returns about which part of a sweep over all layers one over the pilot layers takes.

        Args:
            entries: of one slice of every layer's core, added up.
        """
        return min(self.layers * self.side**2 / entries, 1.0)


SearchEffort.FULL = SearchEffort(8, ((6, 4), (12, 2), (20, 1)), 6, layers=48, side=48)
SearchEffort.QUICK = SearchEffort(1, ((1, 1),), 1, layers=8, side=16)


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
    few = pilot(problem, generator, effort)
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
    on_progress(1.0)  # a start may be perfect before its last sweep
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
    return 1.0 + effort.pilot_part(entries) * effort.pilot_sweeps(starts)  # all cores are read once


def pilot(
    problem: Problem, generator: torch.Generator, effort: SearchEffort = SearchEffort.FULL
) -> Problem:
    """Returns few layers, reduced to their leading rows and columns, with smaller ranks to match.

    Half of them are those of most energy, and half are drawn by energy from the others, for these too
    have a say in the whole.
    """
    energies = torch.cat(list(problem.parallel(_energies, problem.batches)))
    places = [(b, i) for b, batch in enumerate(problem.batches) for i in range(len(batch.layers))]
    chosen = [places[place] for place in _drawn(energies, effort.layers, generator)]
    seed = int(torch.randint(2**62, (), generator=generator))

    batches_of = [problem.batches[b] for b, _ in chosen]
    leading = partial(_leading_part, effort.side, seed)
    layers = list(problem.parallel(leading, batches_of, [i for _, i in chosen]))
    side = max(max(layer.shape[1:]) for layer in layers)
    layers = [
        torch.nn.functional.pad(layer, (0, side - layer.shape[2], 0, side - layer.shape[1]))
        for layer in layers
    ]
    total = torch.tensor([problem.batches[b].ranks for b, _ in chosen]).double().mean(0)
    scale = min(side / _COLUMNS_PER_RANK / float(total.sum()), 1.0)
    ranks = tuple(max(round(scale * rank), 1) for rank in total.tolist())
    length = -(-len(layers) // _PARTS)
    batches = [
        Batch(torch.stack(layers[at : at + length]), ranks, tuple(range(at, at + length)))
        for at in range(0, len(layers), length)
    ]
    energy = sum(float(_energies(batch).sum()) for batch in batches)
    return Problem(tuple(batches), energy, problem.near.parallel, problem.ridge)


def _drawn(energies: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Returns places in rising order, half of them of the largest energies, half drawn by energy."""
    if len(energies) <= count:
        return list(range(len(energies)))
    largest = energies.topk(count - count // 2).indices
    rest = energies.clone()
    rest[largest] = 0
    rest += torch.finfo(rest.dtype).tiny  # where fewer have any
    rest[largest] = 0
    drawn = torch.multinomial(rest, count // 2, generator=generator)
    return sorted([*largest.tolist(), *drawn.tolist()])


def _leading_part(
    side: int, seed: int, batch: Batch, place: int
) -> Tensor:  # (k, <= side, <= side)
    """Returns a layer's slices between the leading directions of their rows and of their columns."""
    slices = batch.slices[place]
    generator = torch.Generator().manual_seed(seed + place)
    for _ in range(2):  # rows, then columns
        rows = slices.transpose(0, 1).flatten(1)  # (p, k q)
        if len(rows) > side:
            basis, _ = leading_factors(rows, side, generator)
            slices = basis.mT @ slices
        slices = slices.mT
    return slices


def _energies(batch: Batch) -> Tensor:  # (b,), float64, CPU
    rows = batch.slices.norm(dim=-1).double()  # the conversion of all entries would take longer
    return rows.square().sum((1, 2)).cpu()


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
