"""Solves for blocks between the layers' bases, from an analysis and a list of ranks."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from hyper_merge.analysis.inputs import multiplier_groups
from hyper_merge.decomposition.greedy import solve_greedy
from hyper_merge.decomposition.initialization import (
    SearchEffort,
    best_start,
    mixed_start,
    search_cost,
)
from hyper_merge.decomposition.ll1 import initial_factors, solve_ll1
from hyper_merge.decomposition.problem import Factors, Problem
from hyper_merge.decomposition.rank_allocation import overcomplete_ranks
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.devices import try_device
from hyper_merge.runtime.parallel import LayerMaps, ParallelMap, parallel_map, return_memory
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.allowance import Allowance
from hyper_merge.solver.batching import Ranks, core_bytes, stack_cores
from hyper_merge.solver.many_inputs import are_many, solve_many
from hyper_merge.solver.metric import Metric
from hyper_merge.solver.private_start import PrivateStart, plan_private_start
from hyper_merge.solver.rank_pruning import (
    GroupSolution,
    given_away,
    joined_losses,
    prune_ranks,
)
from hyper_merge.solver.refinement import refine, try_sweeps
from hyper_merge.solver.solution import LowRankSolution, join_groups
from hyper_merge.solver.stopping import (
    SOLVING,
    USUAL_SWEEPS,
    SolverProgress,
    stop_after_sweeps,
    stop_by_block,
    stop_by_sweep,
)

DEFAULT_EFFORT = SearchEffort.FULL
"""The effort of a search for which no caller names one.

The command line, the tab and the API have no setting for it, so their tests replace this value by
`SearchEffort.QUICK` (fixture `quick_search` of tests/conftest.py); all other tests pass an argument.
"""

# Adaptive ranks: blocks begin with more than their bytes, and the best components stay.
OVERCOMPLETE: Final = 1.5
OVERCOMPLETE_SWEEPS: Final = 2  # with four the result is the same

_HOPELESS: Final = 1.25  # times what the other start leaves: private LoRAs that leave more lose

# For the progress.
USUAL_STARTS: Final = 7
START_SWEEPS: Final = 1.2  # that a start in all layers takes

# Blocks that almost cancel each other are slow to find and say little one by one; this keeps them
# apart, and the loss is nowhere higher for it.
_RIDGE: Final = 0.01


def find_blocks(
    metric: Metric,
    recipe: Recipe,
    ranks: Ranks,
    allowance: Allowance | None,
    device: torch.device,
    progress: Progress,
    start: Mapping[str, Tensor] = MappingProxyType({}),
    effort: SearchEffort | None = None,
) -> LowRankSolution:
    """Solves for blocks and multipliers on the cores; on the CPU where the device cannot do it.

    Args:
        metric: of the loss.
        recipe: the user's settings.
        ranks: even ones.
        allowance: the bytes that adaptive ranks may take instead; None to keep the even ranks.
        device: that computes on the cores.
        progress: progress and interrupt.
        start: multipliers (k, R) to try in addition to the others, by group of layers.
        effort: how thorough the search for a start is; None for `DEFAULT_EFFORT`.
    """
    effort = effort or DEFAULT_EFFORT

    def solve(on: torch.device) -> LowRankSolution:
        return _Solver(metric, recipe, on, progress, start, effort).run(ranks, allowance)

    def warn(failure: str) -> None:
        progress.warn(f"{failure} for the cores; the CPU is used instead")

    return try_device(device, solve, core_bytes(metric), warn)


class _Solver:
    """One solve, in its stages."""

    def __init__(
        self,
        metric: Metric,
        recipe: Recipe,
        device: torch.device,
        progress: Progress,
        start: Mapping[str, Tensor],
        effort: SearchEffort,
    ) -> None:
        self._metric, self._analysis, self._recipe = metric, metric.analysis, recipe
        self._device, self._progress = device, progress
        self._user_start, self._effort = start, effort
        separate = recipe.multipliers == "separate"
        self._groups = multiplier_groups(self._analysis.layers, separate=separate)
        self._generator = torch.Generator().manual_seed(recipe.seed)

    def run(self, even: Ranks, allowance: Allowance | None) -> LowRankSolution:
        """Returns blocks of the even ranks, or of adaptive ones within the allowance."""
        limits = [min(self._analysis.core_shape(index)) for index in range(len(even))]
        even = [
            tuple(min(rank, limit) for rank in layer_ranks)
            for layer_ranks, limit in zip(even, limits, strict=True)
        ]
        if allowance is not None and are_many(self._metric, self._recipe):
            with parallel_map(torch.device("cpu"), self._progress.check) as parallel:
                groups = solve_many(
                    self._metric,
                    self._recipe,
                    allowance,
                    self._groups,
                    parallel,
                    self._progress,
                )
                return self._solution(groups, parallel)
        # Before the map, for the spectra have one of their own.
        ranks = even if allowance is None else self._overcomplete_ranks(limits, allowance)
        with self._analysis.maps(self._device, self._progress.check, SOLVING) as maps:
            groups = self._solved_groups(even, ranks, allowance, maps)
            return self._solution(groups, maps.layers)

    def _solved_groups(
        self, even: Ranks, ranks: Ranks, allowance: Allowance | None, maps: LayerMaps
    ) -> list[GroupSolution]:
        if self._recipe.method == "greedy":
            return [self._greedy(*problem) for problem in self._problems(even, maps, 1)]
        if allowance is None:
            return [self._joint(*problem) for problem in self._problems(even, maps, 1)]
        problems = self._problems(ranks, maps, 2)
        pruned = prune_ranks(
            [self._overcomplete(*problem) for problem in problems], allowance, maps.layers
        )
        return_memory()
        return self._refined_best(pruned, allowance, maps.layers)

    def _refined_best(
        self, pruned: list[GroupSolution], allowance: Allowance, parallel: ParallelMap
    ) -> list[GroupSolution]:
        """Returns the groups after their sweeps, or what follows from private LoRAs if that is better.

        A few sweeps of both tell which of them goes on. No set of factors outlives its use: `pruned`
        is empty afterwards.
        """
        parts = self._parts(2)[len(pruned) :]
        private = plan_private_start(self._metric, len(self._recipe.ranks), allowance)
        if private is None:
            return self._all_refined(pruned, parts, parallel)
        sweeps = self._recipe.iterations
        groups = [try_sweeps(pruned, sweeps, parallel) for _ in self._groups]
        if private.loss < _HOPELESS * joined_losses(groups)[-1]:
            starts = self._private_groups(private)
            others = [try_sweeps(starts, sweeps, parallel) for _ in self._groups]
            is_better = joined_losses(others)[-1] < joined_losses(groups)[-1]
            groups = others if is_better else groups
            del others
        refined = self._all_refined(groups, parts, parallel)
        if joined_losses(refined)[-1] <= private.loss:
            return refined
        return self._all_refined(self._private_groups(private), parts, parallel)

    def _private_groups(self, private: PrivateStart) -> list[GroupSolution]:
        check = self._progress.check
        return [
            private.group(name, self._metric, members, self._device, check)
            for name, members in self._groups.items()
        ]

    def _all_refined(
        self, groups: list[GroupSolution], parts: Sequence[Progress], parallel: ParallelMap
    ) -> list[GroupSolution]:
        return [refine(groups, self._recipe, part, parallel) for part in parts]

    def _overcomplete_ranks(self, limits: Sequence[int], allowance: Allowance) -> Ranks:
        """Returns ranks that take more than the allowance, where the spectra promise most."""
        dimensions = self._analysis.contrasts.dimensions
        gains = [layer.promises(dimensions) for layer in self._metric.spectra]
        budget = OVERCOMPLETE * allowance.budget
        ranks = overcomplete_ranks(gains, allowance.costs, limits, self._recipe.ranks, budget)
        for index, layer in enumerate(self._analysis.layers):
            if layer.whole:  # any rank takes the same bytes
                ranks[index] = (limits[index],) * len(self._recipe.ranks)
        return ranks

    def _problems(
        self, ranks: Ranks, maps: LayerMaps, stages: int
    ) -> Iterator[tuple[str, Problem, SolverProgress]]:
        """Yields the problem of each group, one after the other, with its part of the progress."""
        parts = self._parts(stages)
        for (name, members), part in zip(self._groups.items(), parts, strict=False):
            nonempty = [index for index in members if sum(ranks[index])]
            batches = stack_cores(self._metric, nonempty, ranks, self._device, self._progress.check)
            energy = self._metric.energy(members)
            progress = SolverProgress(part)
            counting, nearby = (
                progress.counting(parallel, len(batches)) for parallel in (maps.layers, maps.small)
            )
            keep = self._analysis.scratch.keep
            yield name, Problem(batches, energy, counting, _RIDGE, keep, nearby), progress

    def _parts(self, stages: int) -> list[Progress]:
        """Returns a part of the progress for every stage of every group, in proportion to its cost."""
        shape = self._analysis.core_shape
        sizes = [
            float(sum(math.prod(shape(index)) for index in members))
            for members in self._groups.values()
        ]
        return self._progress.split(sizes * stages)

    def _greedy(self, name: str, problem: Problem, progress: SolverProgress) -> GroupSolution:
        stopping = stop_by_block(self._recipe, progress)
        solution = solve_greedy(problem.near, self._generator, stopping)
        return GroupSolution.of(name, problem, solution)

    def _joint(self, name: str, problem: Problem, progress: SolverProgress) -> GroupSolution:
        start, fraction = self._start(name, problem, progress, self._recipe.iterations)
        stopping = stop_by_sweep(self._recipe, progress, fraction)
        solution = solve_ll1(problem, self._initial_factors(problem, start), start, stopping)
        return GroupSolution.of(name, problem, solution)

    def _overcomplete(self, name: str, problem: Problem, progress: SolverProgress) -> GroupSolution:
        """Returns blocks of more ranks than the allowance has, which are pruned afterwards."""
        start, fraction = self._start(name, problem, progress, OVERCOMPLETE_SWEEPS)
        sweeps = min(OVERCOMPLETE_SWEEPS, self._recipe.iterations)
        stopping = stop_after_sweeps(progress, fraction, sweeps)
        solution = solve_ll1(problem, self._initial_factors(problem, start), start, stopping)
        return GroupSolution.of(name, problem, solution)

    def _initial_factors(self, problem: Problem, start: Tensor) -> Iterator[Factors]:
        """Returns an iterator that gives the factors away: a caller would keep a tuple of them."""
        return given_away(deque(initial_factors(problem, start, self._generator)))

    def _start(
        self, name: str, problem: Problem, progress: SolverProgress, sweeps: int
    ) -> tuple[Tensor, float]:  # (d, R), and the fraction at which the sweeps begin
        if not problem.batches:
            d = self._analysis.contrasts.dimensions
            return torch.zeros(d, len(self._recipe.ranks), dtype=torch.float64), 0.0
        private = self._metric.directions[:, self._metric.order]
        planned = [private]
        user_starts = self._user_starts(name)
        blocks = len(self._recipe.ranks)
        if blocks > 1:
            gram = self._metric.slice_grams[list(self._groups[name])].sum(0)
            user_starts.append(mixed_start(gram, private, blocks))
        earlier = self._analysis.earlier_solutions(self._solution_name(), name)
        shape = self._analysis.core_shape
        entries = float(sum(math.prod(shape(index)) for index in self._groups[name]))
        starts = len(planned) + len(user_starts) + (len(earlier) or USUAL_STARTS - 1)
        search = search_cost(entries, starts, self._effort)
        total = search + START_SWEEPS + min(sweeps, USUAL_SWEEPS)

        def on_progress(fraction: float) -> None:
            position = (1 + (search - 1) * fraction) / total
            progress.reach("searching for a start", position, position)

        progress.reach("searching for a start", 0.0, 1 / total)  # to choose layers takes a sweep
        start = best_start(
            problem, planned, earlier, self._generator, self._effort, on_progress, user_starts
        )
        return_memory()
        sweeps_begin = (search + START_SWEEPS) / total
        progress.reach(SOLVING, search / total, sweeps_begin)
        return start, sweeps_begin

    def _user_starts(self, name: str) -> list[Tensor]:  # (d, R) each, unit columns
        """Returns the caller's start for a group of layers, if there is one."""
        if name not in self._user_start:
            return []
        start = torch.linalg.pinv(self._metric.to_deviations) @ self._user_start[name].double()
        return [torch.nn.functional.normalize(start, dim=0)]

    def _solution_name(self) -> str:
        """Returns a name that tells the solutions of one analysis apart."""
        recipe = self._recipe
        ranks = ", ".join(map(str, recipe.ranks))
        ends = ["ends"] if any(layer.is_end for layer in self._analysis.layers) else []
        return "; ".join(
            [ranks, recipe.allocation, recipe.multipliers, recipe.layer_weights, *ends]
        )

    def _solution(self, groups: list[GroupSolution], parallel: ParallelMap) -> LowRankSolution:
        """Puts the groups together, and remembers their multipliers for later solves."""
        if self._recipe.method == "joint":
            solutions = {group.name: group.multipliers for group in groups}
            self._analysis.remember(self._solution_name(), solutions)
        return join_groups(self._metric, groups, parallel)
