"""Finds ranks for a budget or a target: from the spectra, then from the explained shares of solves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from hyper_merge.errors import RecipeError
from hyper_merge.operations.merge.budget_search import Solve, solve_for_budget
from hyper_merge.operations.merge.file_overhead import FileOverhead
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.operations.merge.rank_plan import plan_ranks
from hyper_merge.operations.merge.solved_merge import SolvedMerge
from hyper_merge.runtime.formatting import format_size
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.metric import Metric
from hyper_merge.solver.mixture_spectra import forecast_ranks
from hyper_merge.solver.rank_forecast import RankForecast

_TRIES: Final = 4  # solves for one target
_TOLERANCE: Final = 0.003  # above the target: close enough
_TINY: Final = 1e-9  # where a solve leaves nothing


def forecast_ranks_for(metric: Metric, preflight: Preflight, progress: Progress) -> RankForecast:
    """Returns the forecast of what LoRAs of any bytes explain."""
    recipe, inputs = preflight.recipe, preflight.inputs
    names = [header.stem for header in inputs.headers]
    plan = plan_ranks(recipe, inputs)
    forecast = forecast_ranks(metric, plan.groups, names, plan.rank_bytes, progress)
    if recipe.budget is None:
        return forecast
    overhead = FileOverhead.of(recipe, inputs, preflight.norms_and_biases)
    (layout,) = overhead.formats((1,))
    layers = inputs.layout.layers
    empty = layout.size(layers, [0] * len(layers))
    times = len(layers) / len(forecast.sampled)
    entries = tuple(round(times * layout.least_entry(layers[i])) for i in forecast.sampled)
    return replace(forecast, entries=entries, file_bytes=empty + overhead.companions((1,)))


def solve_with_rank_search(
    metric: Metric,
    preflight: Preflight,
    overhead: FileOverhead,
    solve: Solve,
    progress: Progress,
) -> SolvedMerge:
    """Returns a solution with the ranks of the recipe, or with those that its size asks for.

    Args:
        metric: of the loss.
        preflight: the validated recipe.
        overhead: of the merge's files.
        solve: solves for the LoRAs of a plan of ranks.
        progress: progress and interrupt.

    Raises:
        RecipeError: the target cannot be reached; the message names the largest possible one.
    """
    recipe, inputs = preflight.recipe, preflight.inputs
    if not recipe.finds_ranks:
        return solve(plan_ranks(recipe, inputs), progress)
    forecasting, solving = progress.split((0.1, 0.9))
    forecast = forecast_ranks_for(metric, preflight, forecasting)
    if recipe.budget is not None:
        return solve_for_budget(recipe.budget, forecast, overhead, solve, solving)
    return _solve_for_target(recipe.target or 1.0, forecast, preflight, solve, solving)


def _solve_for_target(
    target: float,
    forecast: RankForecast,
    preflight: Preflight,
    solve: Solve,
    progress: Progress,
) -> SolvedMerge:
    """Returns the smallest solution, of a few, with which every checkpoint reaches the target."""
    recipe, inputs = preflight.recipe, preflight.inputs
    best: SolvedMerge | None = None
    sizes: list[int] = []
    best_bytes, highest, aim = 0, 0.0, target
    for part in progress.split((1.0,) * _TRIES):
        factor_bytes = _next_size(aim, forecast, sizes, has_reached=best is not None)
        if factor_bytes is None:
            break
        ranks = forecast.ranks_for(factor_bytes)
        solved = solve(plan_ranks(replace(recipe, ranks=ranks), inputs, factor_bytes), part)
        worst = float(solved.evaluation.fidelity.min())
        highest = max(highest, worst)
        if worst >= target and (best is None or factor_bytes < best_bytes):
            best, best_bytes = solved, factor_bytes
        if target <= worst <= target + _TOLERANCE:
            break
        sizes.append(factor_bytes)
        aim = _next_aim(aim, target, worst)
    if best is None:
        raise _unreachable(target, forecast, highest)
    return best


def _next_size(
    aim: float, forecast: RankForecast, sizes: Sequence[int], *, has_reached: bool
) -> int | None:
    """Returns the bytes of the next solve; None where no other is worth a try.

    Args:
        aim: forecast share at which the target is expected.
        forecast: of what LoRAs explain.
        sizes: of the solves so far.
        has_reached: whether one of them reaches the target; else the largest size is tried too.
    """
    size = forecast.budget_for(aim)
    if sizes and not has_reached and (size is None or len(sizes) == _TRIES - 1):
        size = forecast.largest
    return None if size in sizes else size


def _next_aim(aim: float, target: float, worst: float) -> float:
    """Returns the forecast share at which a solve is expected to reach the target, after one that did not.

    What the forecast leaves is scaled as what the solve left must be: so no aim is beyond the whole, however
    far below its forecast a solve ends.
    """
    left = max(1 - target - _TOLERANCE / 3, (1 - target) / 2)
    return 1 - (1 - aim) * left / max(1 - worst, _TINY)


def _unreachable(target: float, forecast: RankForecast, reached: float) -> RecipeError:
    """Returns the refusal of a target; `reached` is the highest share of the solves, 0 without any."""
    shares = forecast.explained_by_shared(forecast.largest)
    worst = int(shares.argmin())
    highest = reached or float(shares[worst])
    return RecipeError(
        f"the target of {target:.1%} cannot be reached: LoRAs explain at most {highest:.1%} of"
        f" {forecast.names[worst]}, with {format_size(forecast.largest)}",
        hint=f"choose {highest - 0.0005:.1%} or less",
    )
