"""Sweeps over the blocks that remain after the pruning: nearly all of them in narrow cores."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Final

from hyper_merge.decomposition.ll1 import StoppingCriterion, solve_ll1
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.parallel import ParallelMap
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.narrowing import narrow
from hyper_merge.solver.rank_pruning import GroupSolution, given_away
from hyper_merge.solver.stopping import SolverProgress, stop_by_sweep

TRIAL_SWEEPS: Final = 3  # tell a good start from another


def try_sweeps(groups: list[GroupSolution], most: int, parallel: ParallelMap) -> GroupSolution:
    """Takes the first of the groups out, and returns it after a few sweeps, at most so many."""
    group, factors = groups.pop(0).without_factors()
    narrowed = narrow(group, factors, parallel)
    problem = replace(narrowed.group.problem, parallel=parallel)
    stopping = StoppingCriterion(min(TRIAL_SWEEPS, most), 0.0)
    narrowed, factors = narrowed.without_factors()
    solution = solve_ll1(problem, factors, group.multipliers, stopping)
    solution, factors = replace(solution, factors=()), given_away(deque(solution.factors))
    wide = replace(solution, factors=tuple(narrowed.widened(factors, parallel)))
    return GroupSolution.of(group.name, group.problem, wide)


def refine(
    groups: list[GroupSolution], recipe: Recipe, part: Progress, parallel: ParallelMap
) -> GroupSolution:
    """Takes the first of the groups out, and returns it after sweeps to the recipe's tolerance.

    The last sweep is one in the wide cores.

    Args:
        groups: of which the first has blocks between the bases that they were found in.
        recipe: says when the sweeps end.
        part: progress and interrupt.
        parallel: a map over the batches.
    """
    group = groups.pop(0)
    if group.losses and not group.problem.batches:  # tried already, and there is nothing to do
        return group
    progress = SolverProgress(part)
    counting = progress.counting(parallel, len(group.problem.batches))
    group, factors = group.without_factors()
    narrowed = narrow(group, factors, parallel)
    stopping = stop_by_sweep(recipe, progress, 0.0)
    narrowed, factors = narrowed.without_factors()
    problem = replace(narrowed.group.problem, parallel=counting)
    solution = solve_ll1(problem, factors, group.multipliers, stopping)
    problem = replace(group.problem, parallel=counting)  # not the one with the narrow cores
    losses = (*group.losses, *solution.losses)
    if narrowed.is_narrower:
        solution, factors = replace(solution, factors=()), given_away(deque(solution.factors))
        wide = narrowed.widened(factors, parallel)
        multipliers = solution.multipliers
        del narrowed, solution, factors  # the last sweep needs none of them
        solution = solve_ll1(problem, wide, multipliers, StoppingCriterion(1, 0.0))
        losses = (*losses, *solution.losses)
    return GroupSolution.of(group.name, problem, replace(solution, losses=losses))
