"""The curve before anything is written: explained share against bytes, shared, private, average."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from hyper_merge.analysis import cache as analysis_cache
from hyper_merge.analysis.basis_widths import widths_for
from hyper_merge.analysis.store import new_analysis, open_analysis
from hyper_merge.analysis.streaming_pass import run_pass
from hyper_merge.decomposition.clustering import Clusters, clusters
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.operations.merge.rank_search import look
from hyper_merge.operations.merge.report_builder import gram_of
from hyper_merge.runs.folders import Folders
from hyper_merge.runtime.disks import require_disks
from hyper_merge.runtime.progress import Control
from hyper_merge.solver.rank_forecast import Prospects

LOOK_COSTS: Final = (0.9, 0.1)  # of the pass over the files, and of the look at what it found
_SIZES: Final = 49  # of an outlook
_STEPS: Final = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # of the bytes that are asked for


@dataclass(frozen=True)
class Point:
    """What some bytes of LoRAs bring back."""

    size: int  # bytes of all LoRAs
    ranks: tuple[int, ...]  # one LoRA each, in the mean of the layers
    shared: tuple[float, ...]  # explained share of every checkpoint, at least nearly
    private: tuple[float, ...]  # the same with LoRAs of its own for every checkpoint


@dataclass(frozen=True)
class Plan:
    """What could be had, and in what groups the checkpoints fall."""

    names: tuple[str, ...]  # of the checkpoints
    points: tuple[Point, ...]  # by rising size
    asked: Point  # what the recipe asks for
    groups: Clusters


@dataclass(frozen=True)
class Outlook:
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


def make_plan(preflight: Preflight, control: Control, folders: Folders | None = None) -> Plan:
    """Looks at the checkpoints, or at what is remembered of them, and writes nothing but the cache.

    Args:
        preflight: the examined recipe.
        control: progress and interrupt.
        folders: where the cache is; None for those that the recipe was examined with.

    Raises:
        HyperMergeError: refused input, a full disk, or the user's interrupt.
    """
    reading, looking = control.split(LOOK_COSTS)
    path = analysed(preflight, folders or preflight.folders, reading)
    return plan_of(*_looked_at(path, preflight, looking), preflight)


def plan_of(seen: Prospects, groups: Clusters, preflight: Preflight) -> Plan:
    """The plan from what was seen."""
    asked = _asked(preflight, seen.budget_for) or seen.largest
    sizes = [round(asked * step) for step in _STEPS]
    points = [_point(seen, size) for size in sizes if size <= seen.largest]
    return Plan(seen.names, tuple(points), _point(seen, asked), groups)


def known_analysis(preflight: Preflight, folders: Folders) -> Path | None:
    """The analysis of the checkpoints, if it is in the cache."""
    sources, ranks = preflight.sources, preflight.recipe.ranks
    return analysis_cache.find(folders.cache, sources, preflight.work, ranks)


def analysed(preflight: Preflight, folders: Folders, control: Control) -> Path:
    """The analysis of the checkpoints in the cache; made if it is not there."""
    sources, work = preflight.sources, preflight.work
    found = known_analysis(preflight, folders)
    if found is not None:
        analysis_cache.mark_used(found)
        return found
    require_disks({folders.cache: preflight.estimate.analysis})
    path = analysis_cache.path_for(folders.cache, sources, work)
    work = replace(work, widths=widths_for(sources, work.width or 0, control))
    with new_analysis(path, sources, work) as analysis:
        analysis.close_with(run_pass(sources, work, None, analysis.keep, control))
    analysis_cache.prune(folders.cache, folders.cache_limit)
    return path


def outlook(path: Path, preflight: Preflight, control: Control) -> Outlook:
    """The whole curve from an analysis: seconds for big files, nothing for what is asked of it."""
    seen, groups = _looked_at(path, preflight, control)
    least = sum(seen.costs) / 2
    step = (seen.largest / least) ** (1 / (_SIZES - 1))
    sizes = [*(round(least * step**i) for i in range(_SIZES - 1)), seen.largest]
    shared, private = (rows.tolist() for rows in seen.curves(sizes))
    return Outlook(
        seen.names, tuple(sizes), tuple(map(tuple, shared)), tuple(map(tuple, private)), groups
    )


def _looked_at(path: Path, preflight: Preflight, control: Control) -> tuple[Prospects, Clusters]:
    with open_analysis(path, preflight.sources) as analysis:
        return look(analysis, preflight, control), clusters(gram_of(analysis))


def _asked(preflight: Preflight, budget_for: Callable[[float], int | None]) -> int | None:
    """Bytes of what the recipe asks for; None where its target cannot be reached."""
    recipe = preflight.recipe
    if recipe.target is not None:
        return budget_for(recipe.target)
    if recipe.budget is not None:
        return recipe.budget
    pairs = zip(preflight.rank_bytes, preflight.ranks, strict=True)
    return sum(cost * sum(ranks) for cost, ranks in pairs)


def _point(seen: Prospects, size: int) -> Point:
    shared, private = seen.shared(size), seen.of_private(size)
    return Point(size, seen.ranks_for(size), tuple(shared.tolist()), tuple(private.tolist()))
