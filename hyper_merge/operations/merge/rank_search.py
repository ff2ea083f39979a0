"""Ranks for a budget or a target: from the spectra first, then by what the solve really brings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol, TypeVar

from hyper_merge.analysis.loss_weights import layer_weights
from hyper_merge.analysis.store import Analysis
from hyper_merge.errors import RecipeError
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.runtime.formatting import format_size
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.evaluation import Evaluation
from hyper_merge.solver.rank_forecast import RankForecast, forecast_ranks

_TRIES: Final = 4  # solves for one target
_NEAR: Final = 0.003  # above the target: near enough


class _HasFit(Protocol):
    @property
    def found(self) -> Evaluation: ...


_Solved = TypeVar("_Solved", bound=_HasFit)


def forecast_ranks_for(
    analysis: Analysis, preflight: Preflight, progress: Progress
) -> RankForecast:
    """What could be had for how many bytes."""
    names = [header.stem for header in preflight.inputs.headers]
    weights = layer_weights(analysis, preflight.recipe)
    return forecast_ranks(
        analysis, preflight.groups, names, preflight.rank_bytes, weights, progress
    )


def solve_with_rank_search(
    analysis: Analysis,
    preflight: Preflight,
    solve: Callable[[Preflight, Progress], _Solved],
    progress: Progress,
) -> tuple[Preflight, _Solved]:
    """A solution with the ranks that the recipe gives, or with those that its size asks for.

    Args:
        analysis: of the checkpoints.
        preflight: the examined recipe.
        solve: takes it with settled ranks.
        progress: progress and interrupt.

    Raises:
        RecipeError: the target cannot be reached; says what can.
    """
    recipe = preflight.recipe
    if not recipe.finds_ranks:
        return preflight, solve(preflight, progress)
    looking, solving = progress.split((0.1, 0.9))
    seen = forecast_ranks_for(analysis, preflight, looking)
    if recipe.budget is not None:
        preflight = preflight.with_ranks(seen.ranks_for(recipe.budget))
        return preflight, solve(preflight, solving)
    return _solved_for(recipe.target or 1.0, seen, preflight, solve, solving)


def _solved_for(
    target: float,
    seen: RankForecast,
    preflight: Preflight,
    solve: Callable[[Preflight, Progress], _Solved],
    progress: Progress,
) -> tuple[Preflight, _Solved]:
    """The fewest bytes that were found with which every checkpoint reaches the target."""
    best: tuple[Preflight, _Solved] | None = None
    nearest, wanted, parts = 0.0, target, progress.split((1.0,) * _TRIES)
    for part in parts:
        budget = seen.budget_for(min(wanted, 1.0))
        if budget is None:
            break
        ready = preflight.with_ranks(seen.ranks_for(budget), budget)
        solved = solve(ready, part)
        worst = float(solved.found.explained().min())
        nearest = max(nearest, worst)
        if worst >= target and (best is None or budget < _budget(best[0])):
            best = ready, solved
        if target <= worst <= target + _NEAR:
            break
        wanted += target - worst + _NEAR / 3
    if best is None:
        raise _unreachable(target, seen, nearest)
    return best


def _budget(preflight: Preflight) -> int:
    return preflight.budget or 0


def _unreachable(target: float, seen: RankForecast, reached: float) -> RecipeError:
    shares = seen.shared(seen.largest)
    worst = int(shares.argmin())
    nearest = max(reached, float(shares[worst]))
    return RecipeError(
        f"the target of {target:.1%} cannot be reached: LoRAs bring back at most {nearest:.1%}"
        f" of {seen.names[worst]}, with {format_size(seen.largest)}",
        hint=f"choose {nearest - 0.0005:.1%} or less",
    )
