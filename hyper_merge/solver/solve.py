"""From an analysis and a list of ranks to blocks between the layers' bases."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from hyper_merge.analysis.cache import required_width
from hyper_merge.analysis.inputs import MergeInputs, basis_columns, multiplier_groups
from hyper_merge.analysis.loss_weights import make_loss_weights
from hyper_merge.analysis.store import Analysis
from hyper_merge.decomposition.greedy import solve_greedy
from hyper_merge.decomposition.initialization import best_start, search_cost
from hyper_merge.decomposition.ll1 import Batch, Problem, initial_factors, solve_ll1, split_blocks
from hyper_merge.decomposition.rank_allocation import overcomplete_ranks
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.parallel import ParallelMap, parallel_map, return_memory
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.rank_pruning import Allowance, GroupSolution, prune_ranks
from hyper_merge.solver.stopping import (
    USUAL_SWEEPS,
    SolverProgress,
    stop_after_sweeps,
    stop_by_block,
    stop_by_sweep,
)

_BATCH_ENTRIES: Final = {"cpu": 2**19, "cuda": 2**28}  # of the cores in one batch

# Blocks that nearly cancel each other are slow to find and say little one by one; this keeps them
# apart, and the loss is nowhere higher for it.
_RIDGE: Final = 0.01

# Adaptive ranks: blocks begin with more than their bytes, and the best components stay.
_GENEROUS: Final = 1.5
_GENEROUS_SWEEPS: Final = 2  # with four the end is the same
_ROOM: Final = 1.25  # columns of the bases that are worked in, for each rank
_LEAST_ROOM: Final = 64
_ROOM_STEP: Final = 32

# For the progress: what is usual, and times the multiply-adds that small products take.
_USUAL_STARTS: Final = 7
_START: Final = 1.2  # sweeps that a start in all layers takes
_GREEDY_SWEEPS: Final = 2  # that a block of greedy deflation takes
_IN_SWEEP: Final = 4.0
_IN_ROUNDING: Final = 6.5
_IN_FITS: Final = 12.0  # after rounding to float8

Ranks = Sequence[tuple[int, ...]]
"""Of the R blocks, per layer."""


@dataclass(frozen=True, eq=False)
class LowRankSolution:
    """Blocks between the bases, and the multipliers that they were found with."""

    factors: Mapping[int, list[tuple[Tensor, Tensor]]]  # by layer: per block (p, r), (r, q)
    multipliers: Mapping[str, Tensor]  # by group of layers: (k, R), float64
    losses: tuple[float, ...]  # after each sweep (greedy: block), fractions of all energy


def find_blocks(
    analysis: Analysis,
    recipe: Recipe,
    ranks: Ranks,
    allowance: Allowance | None,
    options: tuple[torch.device, Progress],
    start: Mapping[str, Tensor] = MappingProxyType({}),
) -> LowRankSolution:
    """Solves for blocks and multipliers on the cores; on the CPU where the device is too small.

    Args:
        analysis: of the checkpoints.
        recipe: what is asked for.
        ranks: even ones.
        allowance: what adaptive ranks may take in place of those; None to keep to the even ones.
        options: where it is done; progress and interrupt.
        start: multipliers (k, R) that are worth a try besides the others, by group of layers.
    """
    device, progress = options
    try:
        return _Search(analysis, recipe, device, progress, start).run(ranks, allowance)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        progress.warn(f"{device} has too little memory for the cores; the CPU takes them")
        search = _Search(analysis, recipe, torch.device("cpu"), progress, start)
        return search.run(ranks, allowance)


def solve_costs(inputs: MergeInputs, recipe: Recipe, ranks: Ranks) -> tuple[float, float]:
    """What finding and rounding blocks takes, nearly, in multiply-adds of large products."""
    width, slices = required_width(recipe.ranks), inputs.contrasts.dimensions
    entries, sweep, rounding = 0.0, 0.0, 0.0
    for layer, rank in zip(inputs.layout.layers, ranks, strict=True):
        p, q = basis_columns(layer, width)
        entries += p * q
        sweep += p * q * (3 * sum(rank) + 2 * slices * len(rank))
        rounding += (layer.m * p + layer.n * q) * sum(rank)
    if recipe.method == "greedy":
        sweeps = float(_GREEDY_SWEEPS * len(recipe.ranks))
    else:
        sweeps = search_cost(entries, _USUAL_STARTS) + _START
        sweeps += min(recipe.iterations, USUAL_SWEEPS)
        sweeps += _GENEROUS * _GENEROUS_SWEEPS if recipe.allocation == "adaptive" else 0.0
    fits = _IN_FITS if recipe.factors_dtype == "float8" else 0.0
    return sweeps * sweep * _IN_SWEEP, rounding * (_IN_ROUNDING + fits)


class _Search:
    """One solve, in its stages."""

    def __init__(
        self,
        analysis: Analysis,
        recipe: Recipe,
        device: torch.device,
        progress: Progress,
        start: Mapping[str, Tensor],
    ) -> None:
        self._analysis, self._recipe = analysis, recipe
        self._device, self._control, self._given = device, progress, start
        self._weighting = make_loss_weights(analysis, recipe)
        separate = recipe.multipliers == "separate"
        self._groups = multiplier_groups(analysis.layers, separate=separate)
        self._generator = torch.Generator().manual_seed(recipe.seed)

    def run(self, even: Ranks, allowance: Allowance | None) -> LowRankSolution:
        recipe = self._recipe
        limits = [min(self._analysis.core_shape(index)) for index in range(len(even))]
        even = [
            tuple(min(rank, limit) for rank in of_layer)
            for of_layer, limit in zip(even, limits, strict=True)
        ]
        with parallel_map(self._device, self._control.check) as each:
            if recipe.method == "greedy":
                return self._found([self._greedy(*group) for group in self._begin(even, each, 1)])
            if allowance is None:
                return self._found([self._joint(*group) for group in self._begin(even, each, 1)])
            dimensions = self._analysis.contrasts.dimensions
            gains = [
                layer.promises(dimensions) * scale
                for layer, scale in zip(
                    self._analysis.spectra, self._weighting.layers.tolist(), strict=True
                )
            ]
            budget = _GENEROUS * allowance.budget
            ranks = overcomplete_ranks(gains, allowance.costs, limits, recipe.ranks, budget)
            generous = [self._generous(*group) for group in self._begin(ranks, each, 2)]
            return_memory()
            kept = prune_ranks(generous, allowance, each)
            final = zip(kept, self._parts(2)[len(kept) :], strict=True)
            return self._found([self._swept(group, part, each) for group, part in final])

    def _begin(
        self, ranks: Ranks, each: ParallelMap, stages: int
    ) -> Iterator[tuple[str, Problem, SolverProgress]]:
        """The problem of each group, one after the other, with its part of the course."""
        parts = self._parts(stages)
        for (name, members), part in zip(self._groups.items(), parts, strict=False):
            inside = [index for index in members if sum(ranks[index])]
            batches = self._batches(inside, ranks)
            energy = self._weighting.energy(members)
            course = SolverProgress(part)
            counting = course.counting(each, len(batches))
            yield name, Problem(batches, energy, counting, _RIDGE), course

    def _parts(self, stages: int) -> list[Progress]:
        """Parts of the control: for every stage one for every group, by what they take."""
        shape = self._analysis.core_shape
        sizes = [
            float(sum(math.prod(shape(index)) for index in members))
            for members in self._groups.values()
        ]
        return self._control.split(sizes * stages)

    def _batches(self, indices: Sequence[int], ranks: Ranks) -> tuple[Batch, ...]:
        """The cores, stacked where shape and ranks agree, in pieces that fit a cache or a GPU."""
        groups: dict[tuple[tuple[int, int], tuple[int, ...]], list[int]] = {}
        for index in indices:
            room = self._room(index, sum(ranks[index]))
            groups.setdefault((room, ranks[index]), []).append(index)
        batches = []
        d = self._analysis.contrasts.dimensions
        for ((p, q), rank), members in groups.items():
            length = max(_BATCH_ENTRIES[self._device.type] // (d * p * q), 1)
            for start in range(0, len(members), length):
                self._control.check()
                part = tuple(members[start : start + length])
                cores = [self._core(index, p, q) for index in part]
                # A single core stays where it is, mapped: on a CPU that saves most of the memory.
                stack = torch.stack(cores) if length > 1 else cores[0][None]
                batches.append(Batch(stack.to(self._device), rank, part))
        return tuple(batches)

    def _room(self, index: int, rank: int) -> tuple[int, int]:
        """How much of a core is worked in: its leading part, where its bases are in order."""
        layer = self._analysis.layers[index]
        wanted = max(-(-int(_ROOM * rank) // _ROOM_STEP) * _ROOM_STEP, _LEAST_ROOM)
        p, q = self._analysis.core_shape(index)
        return (p if p == layer.m else min(p, wanted), q if q == layer.n else min(q, wanted))

    def _core(self, index: int, p: int, q: int) -> Tensor:  # (d, p, q)
        return self._weighting.core(index, self._analysis.core(index)[:, :p, :q]).contiguous()

    def _greedy(self, name: str, problem: Problem, course: SolverProgress) -> GroupSolution:
        found = solve_greedy(problem, self._generator, stop_by_block(self._recipe, course))
        return GroupSolution(name, problem, found.multipliers, found.factors, found.losses)

    def _joint(self, name: str, problem: Problem, course: SolverProgress) -> GroupSolution:
        start, at = self._start(name, problem, course, self._recipe.iterations)
        stopping = stop_by_sweep(self._recipe, course, at)
        # No name for the factors here, which would keep a set of them in memory for all sweeps.
        found = solve_ll1(
            problem, initial_factors(problem, start, self._generator), start, stopping
        )
        return GroupSolution(name, problem, found.multipliers, found.factors, found.losses)

    def _generous(self, name: str, problem: Problem, course: SolverProgress) -> GroupSolution:
        start, at = self._start(name, problem, course, _GENEROUS_SWEEPS)
        sweeps = min(_GENEROUS_SWEEPS, self._recipe.iterations)
        stopping = stop_after_sweeps(course, at, sweeps)
        found = solve_ll1(
            problem, initial_factors(problem, start, self._generator), start, stopping
        )
        return GroupSolution(name, problem, found.multipliers, found.factors, found.losses)

    def _swept(self, group: GroupSolution, part: Progress, each: ParallelMap) -> GroupSolution:
        course = SolverProgress(part)
        batches = group.problem.batches
        counting = course.counting(each, len(batches))
        problem = replace(group.problem, each=counting)
        stopping = stop_by_sweep(self._recipe, course, 0.0)
        found = solve_ll1(problem, group.factors, group.multipliers, stopping)
        return GroupSolution(group.name, problem, found.multipliers, found.factors, found.losses)

    def _start(
        self, name: str, problem: Problem, course: SolverProgress, sweeps: int
    ) -> tuple[Tensor, float]:  # (d, R), and the fraction at which the sweeps begin
        if not problem.batches:
            d = self._analysis.contrasts.dimensions
            return torch.zeros(d, len(self._recipe.ranks), dtype=torch.float64), 0.0
        planned = [self._weighting.to_deviations.mT]
        given = self._own_starts(name)
        earlier = self._analysis.earlier_solutions(_name(self._recipe), name)
        entries = sum(batch.slices[:, 0].numel() for batch in problem.batches)
        search = search_cost(
            entries, len(planned) + len(given) + (len(earlier) or _USUAL_STARTS - 1)
        )
        whole = search + _START + min(sweeps, USUAL_SWEEPS)

        def tell(fraction: float) -> None:
            at = (1 + (search - 1) * fraction) / whole
            course.reach("searching for a start", at, at)

        course.reach("searching for a start", 0.0, 1 / whole)  # to choose layers takes a sweep
        start = best_start(problem, planned, earlier, self._generator, tell, given)
        return_memory()
        course.reach("solving for the LoRAs", search / whole, (search + _START) / whole)
        return start, (search + _START) / whole

    def _own_starts(self, name: str) -> list[Tensor]:  # each (d, R), unit columns
        """The user's start for a group of layers, if there is one."""
        if name not in self._given:
            return []
        start = torch.linalg.pinv(self._weighting.to_deviations) @ self._given[name].double()
        return [torch.nn.functional.normalize(start, dim=0)]

    def _found(self, groups: Sequence[GroupSolution]) -> LowRankSolution:
        if self._recipe.method == "joint":
            solutions = {group.name: group.multipliers for group in groups}
            self._analysis.remember(_name(self._recipe), solutions)
        factors: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for group in groups:
            for batch, found in zip(group.problem.batches, group.factors, strict=True):
                pairs = list(split_blocks(batch, found))
                for place, index in enumerate(batch.layers):
                    scale = float(self._weighting.layers[index]) ** 0.5
                    factors[index] = [(up[place] / scale, down[place]) for up, down in pairs]
        return LowRankSolution(
            factors,
            {group.name: self._weighting.to_deviations @ group.multipliers for group in groups},
            _together(groups),
        )


def _together(groups: Sequence[GroupSolution]) -> tuple[float, ...]:
    """Losses of all groups together; one that is done earlier stays where it is."""
    total = sum(group.problem.energy for group in groups) or 1.0
    length = max(len(group.losses) for group in groups)
    return tuple(
        sum(
            group.problem.energy * group.losses[min(place, len(group.losses) - 1)]
            for group in groups
            if group.losses
        )
        / total
        for place in range(length)
    )


def _name(recipe: Recipe) -> str:
    """Tells the solutions of one analysis apart."""
    ranks = ", ".join(map(str, recipe.ranks))
    words = [ranks, recipe.allocation, recipe.multipliers, recipe.layer_weights]
    return "; ".join(words)
