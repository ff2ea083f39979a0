"""Solves for the LoRAs of a merge: shared ones of the ranks asked for, and private ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from hyper_merge.decomposition.initialization import SearchEffort
from hyper_merge.operations.merge.budget_search import private_budget
from hyper_merge.operations.merge.file_overhead import FileOverhead
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.operations.merge.rank_plan import RankPlan
from hyper_merge.operations.merge.rank_search import solve_with_rank_search
from hyper_merge.operations.merge.solved_merge import SolvedMerge
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.compressed_residual import SharedLoras
from hyper_merge.solver.evaluation import evaluate
from hyper_merge.solver.metric import Metric
from hyper_merge.solver.private_loras import add_private_loras, find_private_loras
from hyper_merge.solver.quantization import quantize
from hyper_merge.solver.solve import find_blocks


@dataclass(frozen=True, eq=False)
class Search:
    """How a solve goes about it.

    Attributes:
        costs: Expected times of a solve and of the rounding after it, in any unit.
        start: Additional starting multipliers (k, R), by the layers' part.
        effort: How thorough the search for a start is; None for the default.
    """

    costs: tuple[float, float] = (1.0, 0.1)
    start: Mapping[str, Tensor] = field(default_factory=dict)
    effort: SearchEffort | None = None


def solve_shared(
    metric: Metric,
    preflight: Preflight,
    overhead: FileOverhead,
    search: Search,
    progress: Progress,
) -> SolvedMerge:
    """Solves for the shared LoRAs, with a search for their ranks where the recipe gives none.

    Args:
        metric: of the loss.
        preflight: the validated recipe.
        overhead: of the merge's files.
        search: costs, start and effort.
        progress: progress and interrupt.

    Raises:
        RecipeError: the target cannot be reached.
        NonFiniteError: the files' type cannot hold a factor.
    """
    device = preflight.pass_options.device

    def solve(plan: RankPlan, part: Progress) -> SolvedMerge:
        solving, rounding = part.split(search.costs)
        solution = find_blocks(
            metric,
            plan.recipe,
            plan.layer_ranks,
            plan.allowance,
            device,
            solving,
            search.start,
            search.effort,
        )
        factors = quantize(metric, solution, plan.groups, plan.alphas, plan.dtype, rounding)
        evaluation = evaluate(metric, factors, plan.groups)
        return SolvedMerge(plan, factors, evaluation, solution.losses)

    return solve_with_rank_search(metric, preflight, overhead, solve, progress)


def with_private_loras(
    metric: Metric, solved: SolvedMerge, overhead: FileOverhead, progress: Progress
) -> SolvedMerge:
    """Adds private LoRAs for the inputs that are explained worst, if the recipe asks for them."""
    plan = solved.plan
    target = plan.recipe.topup
    if target is None:
        return solved
    shared = SharedLoras(metric, solved.factors, solved.evaluation, plan.groups, plan.dtype)
    loras = find_private_loras(shared, target, progress, private_budget(solved, overhead))
    evaluation = add_private_loras(solved.evaluation, loras)
    return replace(solved, evaluation=evaluation, private_loras=loras)
