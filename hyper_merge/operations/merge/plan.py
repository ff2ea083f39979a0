"""Forecasts before a merge which shares LoRAs of any size explain, shared and private ones."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hyper_merge.analysis.basis_widths import sampled_options
from hyper_merge.analysis.cache import find_analysis, prune_analyses
from hyper_merge.analysis.file_layout import analysis_bytes
from hyper_merge.analysis.store import create_analysis, open_analysis
from hyper_merge.analysis.streaming_pass import stream_layers
from hyper_merge.analysis.turns import analysis_turn
from hyper_merge.decomposition.clustering import Clusters, find_clusters
from hyper_merge.operations.merge.carried_layers import choose_layers
from hyper_merge.operations.merge.cost_model import ExistingFiles
from hyper_merge.operations.merge.estimate import estimate_costs
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.operations.merge.rank_plan import plan_ranks
from hyper_merge.operations.merge.rank_search import forecast_ranks_for
from hyper_merge.runtime.damaged_files import DamagedFiles, with_sound_cache
from hyper_merge.runtime.devices import device_job
from hyper_merge.runtime.disks import require_disks
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.rank_forecast import RankForecast

FORECAST_COSTS: Final = (0.9, 0.1)  # of the pass over the files, and of the forecast
_SIZES: Final = 49  # in a curve
_STEPS: Final = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # times the requested bytes


@dataclass(frozen=True)
class PlannedSize:
    """The forecast for LoRAs of one size."""

    size: int  # bytes of all LoRAs
    ranks: tuple[int, ...]  # one for each LoRA, in the mean of the layers
    shared: tuple[float, ...]  # approximate explained share of every checkpoint
    private: tuple[float, ...]  # the same with private LoRAs for every checkpoint


@dataclass(frozen=True)
class MergePlan:
    """The forecast for several sizes, and the groups that the checkpoints fall into."""

    names: tuple[str, ...]  # of the checkpoints
    points: tuple[PlannedSize, ...]  # by rising size
    requested: PlannedSize  # for the size that the recipe asks for
    groups: Clusters


@dataclass(frozen=True)
class ForecastCurve:
    """The explained shares with shared and with private LoRAs, for sizes from small to large."""

    names: tuple[str, ...]  # of the checkpoints
    sizes: tuple[int, ...]  # bytes of all LoRAs, rising by one factor
    shared: tuple[tuple[float, ...], ...]  # per size: explained share of every checkpoint
    private: tuple[tuple[float, ...], ...]  # the same with private LoRAs for every checkpoint
    groups: Clusters
    ranks: tuple[tuple[int, ...], ...] = ()  # per size: of the shared LoRAs, approximately

    def requested_size(self, preflight: Preflight) -> int | None:
        """Returns the bytes of LoRAs that a recipe asks for; None where its target is out of reach."""
        return _requested_size(preflight, self.size_for)

    def size_for(self, target: float) -> int | None:
        """Returns the fewest bytes with which the worst checkpoint reaches a target; None if none do."""
        worst = [min(shares) for shares in self.shared]
        after = next((i for i, share in enumerate(worst) if share >= target), None)
        if after is None or after == 0:
            return None if after is None else self.sizes[0]
        part = (target - worst[after - 1]) / (worst[after] - worst[after - 1])
        return round(self.sizes[after - 1] ** (1 - part) * self.sizes[after] ** part)

    def at(self, size: int) -> tuple[float, ...]:
        """Returns explained shares with shared LoRAs of a size, interpolated between the known sizes."""
        place = bisect_right(self.sizes, size)
        if place in (0, len(self.sizes)):
            return self.shared[min(place, len(self.sizes) - 1)]
        low, high = self.sizes[place - 1], self.sizes[place]
        part = math.log(size / low) / math.log(high / low)
        pairs = zip(self.shared[place - 1], self.shared[place], strict=True)
        return tuple((1 - part) * before + part * after for before, after in pairs)


def make_plan(preflight: Preflight, progress: Progress) -> MergePlan:
    """Forecasts what LoRAs of several sizes explain; writes nothing but the cache.

    Args:
        preflight: the validated recipe.
        progress: progress and interrupt.

    Raises:
        HyperMergeError: refused input, a full disk, or the user's interrupt.
    """
    reading, forecasting = progress.split(FORECAST_COSTS)

    def attempt(damaged: DamagedFiles) -> MergePlan:
        with (
            ensure_analysis(preflight, reading, damaged) as path,
            open_analysis(
                path,
                preflight.inputs,
                sensitivities=preflight.known_sensitivities,
                resident=preflight.limits.resident,
            ) as analysis,
        ):
            metric, chosen = choose_layers(analysis, preflight, forecasting)
            forecast = forecast_ranks_for(metric, chosen, forecasting)
            return plan_from(forecast, find_clusters(metric.deviation_gram), chosen)

    return with_sound_cache(attempt, progress.warn)


def plan_from(forecast: RankForecast, groups: Clusters, preflight: Preflight) -> MergePlan:
    """Returns the plan that a forecast gives.

    Args:
        forecast: of any size.
        groups: that the inputs fall into.
        preflight: the validated recipe, of whose size the plan's others are multiples.
    """
    requested = _requested_size(preflight, forecast.budget_for) or forecast.largest
    sizes = [round(requested * step) for step in _STEPS]
    points = [_planned_size(forecast, size) for size in sizes if size <= forecast.largest]
    return MergePlan(forecast.names, tuple(points), _planned_size(forecast, requested), groups)


def find_known_analysis(preflight: Preflight) -> Path | None:
    """Returns the path of the checkpoints' analysis in the cache; None if there is none."""
    cache, ranks = preflight.folders.cache, preflight.recipe.ranks
    return find_analysis(cache, preflight.inputs, preflight.pass_options, ranks)


@contextmanager
def ensure_analysis(
    preflight: Preflight, progress: Progress, damaged: DamagedFiles
) -> Iterator[Path]:
    """Gives the path of the checkpoints' analysis in the cache; makes it where it is missing.

    Within the block the analysis is not deleted.

    Args:
        preflight: the validated recipe.
        progress: progress and interrupt.
        damaged: takes the damaged files of the cache, which are not used.

    Raises:
        HyperMergeError: refused input, a full disk, or the user's interrupt.
    """
    inputs, options, folders = preflight.inputs, preflight.pass_options, preflight.folders
    ranks = preflight.recipe.ranks
    with analysis_turn(folders.cache, inputs, options, ranks, damaged, progress) as turn:
        if not turn.exists:
            require_disks({folders.cache: analysis_bytes(inputs, options)})
            options = sampled_options(inputs, options, progress)
            with (
                device_job(options.device),
                create_analysis(turn.path, inputs, options) as analysis,
            ):
                analysis.close_with(stream_layers(inputs, options, None, analysis.keep, progress))
            turn.end_making()
        yield turn.path
    if not turn.exists:
        prune_analyses(folders.cache, folders.cache_limit)


def forecast_curve(path: Path, preflight: Preflight, progress: Progress) -> ForecastCurve:
    """Returns the whole curve from an analysis, which takes seconds for large files.

    Args:
        path: the analysis file.
        preflight: the validated recipe.
        progress: progress and interrupt.

    Raises:
        DamagedCacheError: the analysis is damaged.
        InterruptedRun: the user asked for the run to end.
    """
    sensitivities = preflight.known_sensitivities
    with open_analysis(path, preflight.inputs, sensitivities=sensitivities) as whole:
        metric, preflight = choose_layers(whole, preflight, progress)
        forecast = forecast_ranks_for(metric, preflight, progress)
        groups = find_clusters(metric.deviation_gram)
    least = sum(forecast.costs) / 2
    step = (forecast.largest / least) ** (1 / (_SIZES - 1))
    sizes = [*(round(least * step**i) for i in range(_SIZES - 1)), forecast.largest]
    shared, private = (tuple(map(tuple, rows.tolist())) for rows in forecast.curves(sizes))
    ranks = tuple(forecast.rank_curve(sizes))
    return ForecastCurve(forecast.names, tuple(sizes), shared, private, groups, ranks)


def size_without_forecast(preflight: Preflight) -> int | None:
    """Returns the bytes of LoRAs that a recipe asks for; None where it asks for a share."""
    return _requested_size(preflight, lambda _: None)


def forecast_seconds(preflight: Preflight) -> float:
    """Returns the time that a forecast takes for files that have not been analyzed before."""
    cache = preflight.folders.cache
    existing = ExistingFiles(cache, average=True, analysis=False)
    return estimate_costs(preflight, existing).reading / FORECAST_COSTS[0]


def _requested_size(preflight: Preflight, budget_for: Callable[[float], int | None]) -> int | None:
    """Returns the bytes of LoRAs that the recipe asks for; None where its target is out of reach."""
    recipe = preflight.recipe
    if recipe.target is not None:
        return budget_for(recipe.target)
    if recipe.budget is not None:
        return recipe.budget
    plan = plan_ranks(recipe, preflight.inputs)
    pairs = zip(plan.rank_bytes, plan.layer_ranks, strict=True)
    return sum(cost * sum(ranks) for cost, ranks in pairs)


def _planned_size(forecast: RankForecast, size: int) -> PlannedSize:
    return PlannedSize(
        size,
        forecast.ranks_for(size),
        tuple(forecast.explained_by_shared(size).tolist()),
        tuple(forecast.explained_by_private(size).tolist()),
    )
