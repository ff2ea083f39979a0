"""How far a solve is, told while it goes on, and when its sweeps end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, Final

from hyper_merge.decomposition.ll1 import StoppingCriterion
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.parallel import ParallelMap, return_memory
from hyper_merge.runtime.progress import Progress

USUAL_SWEEPS: Final = 12
_GREEDY_MAPS: Final = 6  # over all layers for a block of greedy deflation
_SWEEPS_PER_RETURN: Final = 3  # of memory to the system


class SolverProgress:
    """Where the solve stands: between two places that are known it moves with every batch."""

    def __init__(self, progress: Progress) -> None:
        """Begins at the start.

        Args:
            progress: the solve's own part of the whole.
        """
        self.check = progress.check
        self._step = progress.report
        self._at = 0.0
        self.reach("", 0.0, 0.0)

    def reach(self, phase: str, at: float, end: float, left: float = 1.0) -> None:
        """Is at a fraction 0..1, never back; every map from now on takes 1 / left of the way to end."""
        self._phase, self._at = phase, max(at, self._at)
        self._end, self._left = max(end, self._at), left

    def counting(self, each: ParallelMap, batches: int) -> ParallelMap:
        """The same map, which tells of every batch that is done."""

        def counted(function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
            start, step = self._at, (self._end - self._at) / self._left
            for done, result in enumerate(each(function, *arguments), 1):
                self._at = start + step * done / batches
                self._step(self._phase, self._at)
                yield result

        return counted


def stop_after_sweeps(course: SolverProgress, at: float, sweeps: int) -> StoppingCriterion:
    """A fixed number of sweeps."""
    done: list[float] = []

    def on_sweep(loss: float) -> None:
        done.append(loss)
        course.reach("solving for the LoRAs", at, 1.0, max(sweeps - len(done), 1))

    course.reach("solving for the LoRAs", at, 1.0, sweeps)
    return StoppingCriterion(sweeps, 0.0, on_sweep)


def stop_by_sweep(recipe: Recipe, course: SolverProgress, at: float) -> StoppingCriterion:
    """As many sweeps as bring something."""
    losses: list[float] = []

    def on_sweep(loss: float) -> None:
        losses.append(loss)
        left = _sweeps_left(losses, recipe)
        course.reach("solving for the LoRAs", at, 1.0, left + 0.5)
        if len(losses) % _SWEEPS_PER_RETURN == 0:
            return_memory()

    course.reach("solving for the LoRAs", at, 1.0, _sweeps_left(losses, recipe) + 0.5)
    return StoppingCriterion(recipe.iterations, recipe.tolerance, on_sweep)


def stop_by_block(recipe: Recipe, course: SolverProgress) -> StoppingCriterion:
    """Turns for each block of greedy deflation."""
    losses: list[float] = []

    def reach() -> None:
        at, end = (min(len(losses) + ahead, count) / count for ahead in (0, 1))
        course.reach("solving for the LoRAs", at, end, _GREEDY_MAPS)

    def on_block(loss: float) -> None:
        losses.append(loss)
        reach()

    count = len(recipe.ranks)
    reach()
    return StoppingCriterion(recipe.iterations, recipe.tolerance, on_block)


def _sweeps_left(losses: Sequence[float], recipe: Recipe) -> float:
    """How many sweeps will follow: the change from one to the next falls as powers of a number do."""
    lows = list(accumulate(losses, min))
    changes = [1 - after / before for before, after in pairwise(lows) if after < before]
    most = max(recipe.iterations - len(losses), 1)
    if len(changes) < 3 or changes[-1] >= changes[0]:
        return max(min(USUAL_SWEEPS - len(losses), most), 1)
    rate = math.log(changes[0] / changes[-1]) / (len(changes) - 1)
    to_go = math.log(changes[-1] / max(recipe.tolerance, 1e-12)) / rate
    return max(min(to_go, most), 1)
