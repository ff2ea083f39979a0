"""Solves for the LoRAs of a budget: of the bytes of all files, not one more rank fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from hyper_merge.operations.merge.file_overhead import FileOverhead
from hyper_merge.operations.merge.rank_plan import RankPlan, plan_ranks
from hyper_merge.operations.merge.solved_merge import SolvedMerge
from hyper_merge.recipe.parsing import PrivateLoraTarget
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.allowance import Allowance
from hyper_merge.solver.private_loras import PrivateBudget, needy_checkpoints
from hyper_merge.solver.rank_forecast import RankForecast

_STEPS: Final = 20  # sizes of the shared LoRAs that are considered beside private ones
_TINY: Final = 1e-300  # where nothing differs
_LEAST: Final = 0.3  # part of a budget that shared LoRAs get in any case

Solve = Callable[[RankPlan, Progress], SolvedMerge]


def solve_for_budget(
    budget: int,
    forecast: RankForecast,
    overhead: FileOverhead,
    solve: Solve,
    progress: Progress,
) -> SolvedMerge:
    """Returns the solution whose files, with companions and private LoRAs, fill a budget.

    Where one LoRA for each checkpoint is forecast to be better than the solution with fewer, a
    solution with as many is tried too. Where the recipe asks for private LoRAs, room is left for them; `private_budget` gives it away.

    Args:
        budget: bytes of all files.
        forecast: of what LoRAs explain.
        overhead: of the merge's files.
        solve: solves for the shared LoRAs of a plan of ranks.
        progress: progress and interrupt.
    """

    def plan(total: int, ranks: tuple[int, ...]) -> RankPlan:
        formats, companions = overhead.formats(ranks), overhead.companions(ranks)
        recipe = replace(overhead.recipe, ranks=ranks)
        return plan_ranks(recipe, overhead.inputs, total - companions, formats)

    def best(total: int, part: Progress) -> SolvedMerge:
        first, second = part.split((0.9, 0.1))
        ranks = forecast.ranks_for(total)
        solved = solve(plan(total, ranks), first)
        private = 1 - forecast.private_gain(total) / max(float(forecast.energies.sum()), _TINY)
        if len(ranks) >= len(forecast.names) or solved.evaluation.weighted_loss <= private:
            return solved
        other = solve(plan(total, forecast.private_ranks_for(total)), second)
        return min(solved, other, key=lambda solution: solution.evaluation.weighted_loss)

    target = overhead.recipe.topup
    if target is None:
        return best(budget, progress)
    first, second = progress.split((0.9, 0.1))
    solved = best(_shared_bytes(budget, target, forecast), first)
    if needy_checkpoints(solved.evaluation.fidelity, target):
        return solved
    return best(budget, second)  # as it turns out, no private LoRA is needed


def private_budget(solved: SolvedMerge, overhead: FileOverhead) -> PrivateBudget | None:
    """Returns the bytes that a budget leaves for private LoRAs; None without a budget."""
    recipe, allowance = solved.plan.recipe, solved.plan.allowance
    if recipe.budget is None or allowance is None:
        return None
    shared = allowance.size(solved.factors.ranks) + overhead.companions(recipe.ranks)

    def of_file(checkpoint: int, size: int) -> Allowance:
        layout = overhead.private_format(recipe.ranks, checkpoint)
        return Allowance(allowance.layers, allowance.costs, size, (layout,))

    return PrivateBudget(recipe.budget - shared, of_file)


def _shared_bytes(budget: int, target: PrivateLoraTarget, forecast: RankForecast) -> int:
    """Returns the bytes of the shared LoRAs that leave as much as the private ones will need."""
    sizes = [budget * step // _STEPS for step in range(_STEPS, int(_LEAST * _STEPS) - 1, -1)]
    fitting = (size for size in sizes if size + _private_bytes(size, target, forecast) <= budget)
    return next(fitting, sizes[-1])


def _private_bytes(size: int, target: PrivateLoraTarget, forecast: RankForecast) -> int:
    """Returns about how many bytes private LoRAs take in addition to shared ones of a size."""
    explained = forecast.explained_by_shared(size)
    chosen = needy_checkpoints(explained, target)
    if target.rank is not None:
        entries = sum(forecast.entries) + forecast.file_bytes
        return len(chosen) * (target.rank * sum(forecast.costs) + entries)
    return sum(
        forecast.private_size(c, target.share or 0.0)
        - forecast.private_size(c, float(explained[c]))
        for c in chosen
    ) + forecast.file_bytes * len(chosen)
