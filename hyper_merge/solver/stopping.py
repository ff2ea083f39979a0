"""Reports the progress of a solve, and decides when its sweeps end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, Final

from hyper_merge.decomposition.ll1 import StoppingCriterion
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.parallel import ParallelMap
from hyper_merge.runtime.progress import Progress

SOLVING: Final = "solving for the LoRAs"
"""The phase."""

USUAL_SWEEPS: Final = 12
_GREEDY_MAPS: Final = 6  # over all layers for a block of greedy deflation


class SolverProgress:
    """How far a solve is: between two known fractions it moves with every batch."""

    def __init__(self, progress: Progress) -> None:
        """Begins at 0.

        Args:
            progress: the solve's own part of the whole.
        """
        self.check = progress.check
        self._report = progress.report
        self._fraction = 0.0
        self.reach("", 0.0, 0.0)

    def reach(self, phase: str, fraction: float, end: float, maps_left: float = 1.0) -> None:
        """Moves to a fraction 0..1, never back.

        Args:
            phase: the work from now on, as text.
            fraction: of the whole solve that is done.
            end: fraction at the end of the phase.
            maps_left: every map from now on takes 1 / maps_left of the way to the end.
        """
        self._phase, self._fraction = phase, max(fraction, self._fraction)
        self._end, self._maps_left = max(end, self._fraction), maps_left

    def counting(self, parallel: ParallelMap, batches: int) -> ParallelMap:
        """Returns a map that works like another one and also reports every batch that is done."""

        def counted(function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
            start, step = self._fraction, (self._end - self._fraction) / self._maps_left
            for done, result in enumerate(parallel(function, *arguments), 1):
                self._fraction = start + step * done / batches
                self._report(self._phase, self._fraction)
                yield result

        return counted


def stop_after_sweeps(progress: SolverProgress, begin: float, sweeps: int) -> StoppingCriterion:
    """Returns a criterion of a fixed number of sweeps, which begin at a fraction of the solve."""
    done: list[float] = []

    def on_sweep(loss: float) -> None:
        done.append(loss)
        progress.reach(SOLVING, begin, 1.0, max(sweeps - len(done), 1))

    progress.reach(SOLVING, begin, 1.0, sweeps)
    return StoppingCriterion(sweeps, 0.0, on_sweep)


def stop_by_sweep(recipe: Recipe, progress: SolverProgress, begin: float) -> StoppingCriterion:
    """Returns the recipe's criterion for sweeps, which begin at a fraction of the solve."""
    losses: list[float] = []

    def on_sweep(loss: float) -> None:
        losses.append(loss)
        left = _sweeps_left(losses, recipe)
        progress.reach(SOLVING, begin, 1.0, left + 0.5)

    progress.reach(SOLVING, begin, 1.0, _sweeps_left(losses, recipe) + 0.5)
    return StoppingCriterion(recipe.iterations, recipe.tolerance, on_sweep)


def stop_by_block(recipe: Recipe, progress: SolverProgress) -> StoppingCriterion:
    """Returns the recipe's criterion for the turns of each block of greedy deflation."""
    losses: list[float] = []

    def reach() -> None:
        begin, end = (min(len(losses) + ahead, count) / count for ahead in (0, 1))
        progress.reach(SOLVING, begin, end, _GREEDY_MAPS)

    def on_block(loss: float) -> None:
        losses.append(loss)
        reach()

    count = len(recipe.ranks)
    reach()
    return StoppingCriterion(recipe.iterations, recipe.tolerance, on_block)


def _sweeps_left(losses: Sequence[float], recipe: Recipe) -> float:
    """Returns how many sweeps will follow, since their changes fall like powers of a number."""
    lows = list(accumulate(losses, min))
    changes = [1 - after / before for before, after in pairwise(lows) if after < before]
    most = max(recipe.iterations - len(losses), 1)
    if len(changes) < 3 or changes[-1] >= changes[0]:
        return max(min(USUAL_SWEEPS - len(losses), most), 1)
    rate = math.log(changes[0] / changes[-1]) / (len(changes) - 1)
    to_go = math.log(changes[-1] / max(recipe.tolerance, 1e-12)) / rate
    return max(min(to_go, most), 1)
