"""The curve before anything is written: explained share against bytes, shared, private, average."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from hyper_merge.analysis import cache as analysis_cache
from hyper_merge.analysis.basis_widths import choose_widths
from hyper_merge.analysis.store import create_analysis, open_analysis
from hyper_merge.analysis.streaming_pass import stream_layers
from hyper_merge.analysis.turns import analysis_turn
from hyper_merge.decomposition.clustering import Clusters, find_clusters
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.operations.merge.rank_search import forecast_ranks_for
from hyper_merge.operations.merge.report_builder import gram_of
from hyper_merge.runs.folders import Folders
from hyper_merge.runtime.damaged_files import DamagedFiles, with_sound_cache
from hyper_merge.runtime.disks import require_disks
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.rank_forecast import RankForecast

FORECAST_COSTS: Final = (0.9, 0.1)  # of the pass over the files, and of the look at what it found
_SIZES: Final = 49  # of an outlook
_STEPS: Final = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # of the bytes that are asked for


@dataclass(frozen=True)
class PlannedSize:
    """What some bytes of LoRAs bring back."""

    size: int  # bytes of all LoRAs
    ranks: tuple[int, ...]  # one LoRA each, in the mean of the layers
    shared: tuple[float, ...]  # explained share of every checkpoint, at least nearly
    private: tuple[float, ...]  # the same with LoRAs of its own for every checkpoint


@dataclass(frozen=True)
class MergePlan:
    """What could be had, and in what groups the checkpoints fall."""

    names: tuple[str, ...]  # of the checkpoints
    points: tuple[PlannedSize, ...]  # by rising size
    asked: PlannedSize  # what the recipe asks for
    groups: Clusters


@dataclass(frozen=True)
class ForecastCurve:
    """What shared and private LoRAs bring back, for sizes of all kinds."""

    names: tuple[str, ...]  # of the checkpoints
    sizes: tuple[int, ...]  # bytes of all LoRAs, rising by one factor
    shared: tuple[tuple[float, ...], ...]  # per size: explained share of every checkpoint
    private: tuple[tuple[float, ...], ...]  # the same with LoRAs of its own for every checkpoint
    groups: Clusters

    def asked(self, preflight: Preflight) -> int | None:
        """Bytes of what a recipe asks for; None where its target cannot be reached."""
        return _asked(preflight, self.size_for)

    def size_for(self, target: float) -> int | None:
        """The fewest bytes at which the worst checkpoint's share reaches a target; None if none do."""
        worst = [min(shares) for shares in self.shared]
        after = next((i for i, share in enumerate(worst) if share >= target), None)
        if after is None or after == 0:
            return None if after is None else self.sizes[0]
        part = (target - worst[after - 1]) / (worst[after] - worst[after - 1])
        return round(self.sizes[after - 1] ** (1 - part) * self.sizes[after] ** part)

    def at(self, size: int) -> tuple[float, ...]:
        """Explained shares with shared LoRAs of so many bytes, between the sizes that are known."""
        place = bisect_right(self.sizes, size)
        if place in (0, len(self.sizes)):
            return self.shared[min(place, len(self.sizes) - 1)]
        low, high = self.sizes[place - 1], self.sizes[place]
        part = math.log(size / low) / math.log(high / low)
        pairs = zip(self.shared[place - 1], self.shared[place], strict=True)
        return tuple((1 - part) * before + part * after for before, after in pairs)


def make_plan(
    preflight: Preflight, progress: Progress, folders: Folders | None = None
) -> MergePlan:
    """Looks at the checkpoints, or at what is remembered of them, and writes nothing but the cache.

    Args:
        preflight: the examined recipe.
        progress: progress and interrupt.
        folders: where the cache is; None for those that the recipe was examined with.

    Raises:
        HyperMergeError: refused input, a full disk, or the user's interrupt.
    """
    reading, looking = progress.split(FORECAST_COSTS)

    def seen(damaged: DamagedFiles) -> tuple[RankForecast, Clusters]:
        with ensure_analysis(preflight, folders or preflight.folders, reading, damaged) as path:
            return _looked_at(path, preflight, looking)

    return make_plan_from(*with_sound_cache(seen, progress.warn), preflight)


def make_plan_from(seen: RankForecast, groups: Clusters, preflight: Preflight) -> MergePlan:
    """The plan from what was seen."""
    asked = _asked(preflight, seen.budget_for) or seen.largest
    sizes = [round(asked * step) for step in _STEPS]
    points = [_point(seen, size) for size in sizes if size <= seen.largest]
    return MergePlan(seen.names, tuple(points), _point(seen, asked), groups)


def find_known_analysis(preflight: Preflight, folders: Folders) -> Path | None:
    """The analysis of the checkpoints, if it is in the cache."""
    inputs, ranks = preflight.inputs, preflight.recipe.ranks
    return analysis_cache.find_analysis(folders.cache, inputs, preflight.pass_options, ranks)


@contextmanager
def ensure_analysis(
    preflight: Preflight, folders: Folders, progress: Progress, damaged: DamagedFiles
) -> Iterator[Path]:
    """The analysis of the checkpoints in the cache, kept there within the block; made if need be."""
    inputs, options, ranks = preflight.inputs, preflight.pass_options, preflight.recipe.ranks
    with analysis_turn(folders.cache, inputs, options, ranks, damaged, progress) as turn:
        if not turn.exists:
            require_disks({folders.cache: preflight.estimate.analysis})
            options = replace(options, widths=choose_widths(inputs, options.width or 0, progress))
            with create_analysis(turn.path, inputs, options) as analysis:
                analysis.close_with(stream_layers(inputs, options, None, analysis.keep, progress))
            turn.end_making()
        yield turn.path
    if not turn.exists:
        analysis_cache.prune_analyses(folders.cache, folders.cache_limit)


def forecast_curve(path: Path, preflight: Preflight, progress: Progress) -> ForecastCurve:
    """The whole curve from an analysis: seconds for big files, nothing for what is asked of it."""
    seen, groups = _looked_at(path, preflight, progress)
    least = sum(seen.costs) / 2
    step = (seen.largest / least) ** (1 / (_SIZES - 1))
    sizes = [*(round(least * step**i) for i in range(_SIZES - 1)), seen.largest]
    shared, private = (rows.tolist() for rows in seen.curves(sizes))
    return ForecastCurve(
        seen.names, tuple(sizes), tuple(map(tuple, shared)), tuple(map(tuple, private)), groups
    )


def _looked_at(
    path: Path, preflight: Preflight, progress: Progress
) -> tuple[RankForecast, Clusters]:
    with open_analysis(path, preflight.inputs) as analysis:
        return forecast_ranks_for(analysis, preflight, progress), find_clusters(gram_of(analysis))


def _asked(preflight: Preflight, budget_for: Callable[[float], int | None]) -> int | None:
    """Bytes of what the recipe asks for; None where its target cannot be reached."""
    recipe = preflight.recipe
    if recipe.target is not None:
        return budget_for(recipe.target)
    if recipe.budget is not None:
        return recipe.budget
    pairs = zip(preflight.rank_bytes, preflight.ranks, strict=True)
    return sum(cost * sum(ranks) for cost, ranks in pairs)


def _point(seen: RankForecast, size: int) -> PlannedSize:
    shared, private = seen.shared(size), seen.of_private(size)
    return PlannedSize(size, seen.ranks_for(size), tuple(shared.tolist()), tuple(private.tolist()))
