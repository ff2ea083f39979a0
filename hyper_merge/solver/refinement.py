"""Sweeps over the blocks that remain after the pruning: nearly all of them in narrow cores."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from hyper_merge.decomposition.ll1 import StoppingCriterion, solve_ll1
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.parallel import ParallelMap
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.narrowing import narrow
from hyper_merge.solver.rank_pruning import GroupSolution
from hyper_merge.solver.stopping import SolverProgress, stop_by_sweep

TRIAL_SWEEPS: Final = 3  # tell a good start from another


def try_sweeps(group: GroupSolution, most: int, parallel: ParallelMap) -> GroupSolution:
    """Returns a group after a few sweeps, at most so many."""
    narrowed = narrow(group, parallel)
    problem = replace(narrowed.group.problem, parallel=parallel)
    stopping = StoppingCriterion(min(TRIAL_SWEEPS, most), 0.0)
    solution = solve_ll1(problem, narrowed.group.factors, group.multipliers, stopping)
    wide = replace(solution, factors=narrowed.widened(solution.factors))
    return GroupSolution.of(group.name, group.problem, wide)


def refine(
    group: GroupSolution, recipe: Recipe, part: Progress, parallel: ParallelMap
) -> GroupSolution:
    """Returns a group after sweeps to the recipe's tolerance, and one in the wide cores.

    Args:
        group: the blocks, between the bases that they were found in.
        recipe: says when the sweeps end.
        part: progress and interrupt.
        parallel: a map over the batches.
    """
    if group.losses and not group.problem.batches:  # tried already, and there is nothing to do
        return group
    progress = SolverProgress(part)
    counting = progress.counting(parallel, len(group.problem.batches))
    narrowed = narrow(group, parallel)
    group = replace(group, factors=())  # the wide ones
    stopping = stop_by_sweep(recipe, progress, 0.0)
    problem = replace(narrowed.group.problem, parallel=counting)
    solution = solve_ll1(problem, narrowed.group.factors, group.multipliers, stopping)
    losses = (*group.losses, *solution.losses)
    if narrowed.is_narrower:
        problem = replace(group.problem, parallel=counting)
        factors, multipliers = narrowed.widened(solution.factors), solution.multipliers
        del narrowed, solution  # the last sweep needs neither
        solution = solve_ll1(problem, factors, multipliers, StoppingCriterion(1, 0.0))
        losses = (*losses, *solution.losses)
    return GroupSolution.of(group.name, problem, replace(solution, losses=losses))
