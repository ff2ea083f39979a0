"""The curve before anything is written: explained share against bytes, shared, private, average."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from hyper_merge import analysis_cache
from hyper_merge.analysis import run_pass
from hyper_merge.analysis_cache import new_analysis, open_analysis
from hyper_merge.control import Control
from hyper_merge.decomposition.clusters import Clusters, clusters
from hyper_merge.folders import Folders
from hyper_merge.preflight import Preflight, require_disks
from hyper_merge.prospects import Prospects
from hyper_merge.report import gram_of
from hyper_merge.settle import look
from hyper_merge.widths import widths_for

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


def make_plan(preflight: Preflight, control: Control, folders: Folders | None = None) -> Plan:
    """Looks at the checkpoints, or at what is remembered of them, and writes nothing but the cache.

    Args:
        preflight: the examined recipe.
        control: progress and interrupt.
        folders: where the cache is; None for those that the recipe was examined with.

    Raises:
        HyperMergeError: refused input, a full disk, or the user's interrupt.
    """
    folders = folders or preflight.folders
    reading, looking = control.split((0.9, 0.1))
    path = _analysed(preflight, folders, reading)
    with open_analysis(path, preflight.sources) as analysis:
        seen = look(analysis, preflight, looking)
        groups = clusters(gram_of(analysis))
    return plan_of(seen, preflight, groups)


def plan_of(seen: Prospects, preflight: Preflight, groups: Clusters) -> Plan:
    """The plan from what was seen; takes a second, so it can follow a rank list as that is typed."""
    asked = _asked(seen, preflight)
    sizes = [round(asked * step) for step in _STEPS]
    points = [_point(seen, size) for size in sizes if size <= seen.largest]
    return Plan(seen.names, tuple(points), _point(seen, asked), groups)


def _analysed(preflight: Preflight, folders: Folders, control: Control) -> Path:
    """The analysis of the checkpoints in the cache; made if it is not there."""
    sources, work = preflight.sources, preflight.work
    found = analysis_cache.find(folders.cache, sources, work, preflight.recipe.ranks)
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


def _asked(seen: Prospects, preflight: Preflight) -> int:
    """Bytes of what the recipe asks for; of all that there is where its target cannot be reached."""
    recipe = preflight.recipe
    if recipe.target is not None:
        return seen.budget_for(recipe.target) or seen.largest
    if recipe.budget is not None:
        return recipe.budget
    pairs = zip(preflight.rank_bytes, preflight.ranks, strict=True)
    return sum(cost * sum(ranks) for cost, ranks in pairs)


def _point(seen: Prospects, size: int) -> Point:
    shared, private = seen.shared(size), seen.of_private(size)
    return Point(size, seen.ranks_for(size), tuple(shared.tolist()), tuple(private.tolist()))
