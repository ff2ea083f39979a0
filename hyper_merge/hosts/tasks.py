"""Runs the long work of the tab and of the API: a merge, a fit or a forecast, each in its turn.

The request is made again when the turn comes: the host's list may have changed in the meantime.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from hyper_merge.errors import HyperMergeError, OutputError
from hyper_merge.hosts.host import Host
from hyper_merge.operations.compare.compare import run_compare
from hyper_merge.operations.compare.records import ComparisonRecord
from hyper_merge.operations.compare.request import CompareRequest
from hyper_merge.operations.fit.fit import run_fit
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.merge.merge import run_merge
from hyper_merge.operations.merge.plan import (
    FORECAST_COSTS,
    ForecastCurve,
    ensure_analysis,
    find_known_analysis,
    forecast_curve,
)
from hyper_merge.operations.merge.preflight import Preflight, run_preflight
from hyper_merge.operations.merge.rank_plan import plan_ranks
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runs.fit_records import styles_of
from hyper_merge.runs.run import load_run
from hyper_merge.runtime.damaged_files import DamagedFiles, with_sound_cache
from hyper_merge.runtime.progress import Progress

_Result = TypeVar("_Result")

FORECAST_TITLE: Final = "the forecast"
"""The title of the job that runs `forecast_task`."""


@contextmanager
def host_turn(host: Host, task: str, progress: Progress) -> Iterator[Progress]:
    """Waits for a turn of the host; yields a progress that reports to job and host and obeys both."""
    with host.running(task) as host_progress:
        joined = progress.joined(host_progress)
        joined.report("starting", 0.0)
        yield joined


def turn_task(
    host: Host, work: Callable[[Progress], _Result], task: str, progress: Progress
) -> _Result:
    """Does some work in a turn of the host, which then lists the new files; returns its result."""
    with host_turn(host, task, progress) as joined:
        result = work(joined)
        host.refresh()
    return result


def compare_task(
    host: Host, request: CompareRequest, task: str, progress: Progress
) -> ComparisonRecord:
    """Draws a comparison in a turn of the host."""
    with host.drawing(task) as (host_progress, generator):
        joined = progress.joined(host_progress)
        joined.report("starting", 0.0)
        return run_compare(request, host.folders(), joined, generator)


def merge_task(
    host: Host,
    make_recipe: Callable[[], Recipe],
    save_styles: bool,
    task: str,
    progress: Progress,
) -> str:
    """Merges, and saves a style for each checkpoint if requested; returns the run's name."""
    with host_turn(host, task, progress) as joined:
        folders = host.folders()
        preflight = run_preflight(make_recipe(), folders)
        for warning in preflight.warnings:
            joined.warn(warning)
        name = run_merge(preflight, joined).place.run
        host.refresh()
        if save_styles:
            _save_styles(host, styles_of(load_run(folders, name)), "merge", joined)
    return name


def fit_task(
    host: Host,
    make_request: Callable[[], FitRequest],
    save_styles: bool,
    task: str,
    progress: Progress,
) -> str:
    """Fits a checkpoint onto a run, and saves its style if requested; returns the run's name."""
    with host_turn(host, task, progress) as joined:
        folders = host.folders()
        fitted = run_fit(make_request(), folders, joined)
        if fitted.topups:
            host.refresh()
        if save_styles:
            style = fitted.style(load_run(folders, fitted.run))
            _save_styles(host, dict([style]), "fit", joined)
    return fitted.run


def _save_styles(host: Host, styles: Mapping[str, str], work: str, progress: Progress) -> None:
    """Saves styles where the host has any; a refusal does not undo the work."""
    if not host.has_txt2img:
        return
    try:
        host.save_styles(styles)
    except OutputError as error:
        progress.warn(f"The {work} is done, but its styles are not saved: {error}")


def known_forecast(preflight: Preflight) -> ForecastCurve | None:
    """Returns the forecast for a merge, or None where its files have not been analyzed before."""
    try:
        path = find_known_analysis(preflight)
        return _cached_forecast(_forecast_key(path, preflight, Progress())) if path else None
    except (HyperMergeError, OSError):  # the cache was cleared just now, or a checkpoint removed
        return None


@dataclass(frozen=True)
class _ForecastKey:
    """The values that decide a forecast, and those that compute it, which are not compared."""

    path: Path
    changed: int  # of the analysis file: nanoseconds
    rank_bytes: tuple[int, ...]
    separate: bool
    layer_weights: str
    measured: bool  # whether the sensitivities of the layers are known
    preflight: Preflight = field(compare=False)
    progress: Progress = field(compare=False)


def _forecast_key(path: Path, preflight: Preflight, progress: Progress) -> _ForecastKey:
    return _ForecastKey(
        path=path,
        changed=path.stat().st_mtime_ns,
        rank_bytes=plan_ranks(preflight.recipe, preflight.inputs).rank_bytes,
        separate=preflight.recipe.multipliers == "separate",
        layer_weights=preflight.recipe.layer_weights,
        measured=preflight.network is not None and preflight.network.is_known,
        preflight=preflight,
        progress=progress,
    )


@functools.lru_cache(maxsize=8)
def _cached_forecast(key: _ForecastKey) -> ForecastCurve:
    """Computes a forecast, which takes seconds, once for as long as the analysis is the same."""
    return forecast_curve(key.path, key.preflight, key.progress)


def forecast_task(
    host: Host, make_preflight: Callable[[], Preflight], task: str, progress: Progress
) -> str:
    """Analyzes the files in a turn of the host, after which `known_forecast` has the forecast."""
    with host_turn(host, task, progress) as joined:
        preflight = make_preflight()
        reading, forecasting = joined.split(FORECAST_COSTS)

        def forecast(damaged: DamagedFiles) -> ForecastCurve:
            with ensure_analysis(preflight, reading, damaged) as path:
                return _cached_forecast(_forecast_key(path, preflight, forecasting))

        with_sound_cache(forecast, joined.warn)
    return ""
