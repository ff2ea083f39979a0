"""The long work of the tab and of the API: a merge, a fit, each in a turn of the host's.

What is asked for is made anew when the turn comes: the host's list may have changed meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hyper_merge.errors import HyperMergeError, OutputError
from hyper_merge.hosts.host import Host
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

FORECAST_TITLE: Final = "the forecast"
"""Its job's title."""


@contextmanager
def host_turn(host: Host, task: str, progress: Progress) -> Iterator[Progress]:
    """A turn of the host's for a task; gives a control that tells host and job, and hears both."""
    with host.running(task) as hosts:
        both = progress.joined(hosts)
        both.report("starting", 0.0)
        yield both


def merge_task(
    host: Host, asked: Callable[[], Recipe], save_styles: bool, task: str, progress: Progress
) -> str:
    """Merges, and saves a style per checkpoint if that is wished; returns the run's name."""
    with host_turn(host, task, progress) as both:
        folders = host.folders()
        preflight = run_preflight(asked(), folders)
        for warning in preflight.warnings:
            both.warn(warning)
        name = run_merge(preflight, both).place.run
        host.refresh()
        if save_styles:
            _save(host, styles_of(load_run(folders, name)), "merge", both)
    return name


def fit_task(
    host: Host, asked: Callable[[], FitRequest], save_styles: bool, task: str, progress: Progress
) -> str:
    """Fits a checkpoint onto a run, and saves its style if that is wished; returns the run's name."""
    with host_turn(host, task, progress) as both:
        folders = host.folders()
        fitted = run_fit(asked(), folders, both)
        if fitted.topups:
            host.refresh()
        if save_styles:
            _save(host, dict([fitted.style(load_run(folders, fitted.run))]), "fit", both)
    return fitted.run


def _save(host: Host, styles: Mapping[str, str], what: str, progress: Progress) -> None:
    """Saves styles where the host has any; a refusal does not undo the work."""
    if not host.has_txt2img:
        return
    try:
        host.save_styles(styles)
    except OutputError as error:
        progress.warn(f"The {what} is done, but its styles are not saved: {error}")


def known_forecast(preflight: Preflight) -> ForecastCurve | None:
    """What could be had, if the files have been looked at before."""
    path = find_known_analysis(preflight)
    try:
        return None if path is None else _outlook(_question(path, preflight, Progress()))
    except (HyperMergeError, OSError):  # the cache was cleared just now
        return None


@dataclass(frozen=True)
class _Question:
    """All that decides an outlook, and what answers it."""

    path: Path
    changed: int
    costs: tuple[int, ...]
    separate: bool
    layer_weights: str
    preflight: Preflight = field(compare=False)
    progress: Progress = field(compare=False)


def _question(path: Path, preflight: Preflight, progress: Progress) -> _Question:
    separate = preflight.recipe.multipliers == "separate"
    weights = preflight.recipe.layer_weights
    changed = path.stat().st_mtime_ns
    costs = plan_ranks(preflight.recipe, preflight.inputs).rank_bytes
    return _Question(path, changed, costs, separate, weights, preflight, progress)


@functools.lru_cache(maxsize=8)
def _outlook(question: _Question) -> ForecastCurve:
    """What could be had, which takes seconds and is not found again while the analysis is the same."""
    return forecast_curve(question.path, question.preflight, question.progress)


def forecast_task(host: Host, asked: Callable[[], Preflight], task: str, progress: Progress) -> str:
    """Looks at the files in a turn of the host's, so that `known_forecast` knows what could be had."""
    with host_turn(host, task, progress) as both:
        preflight = asked()
        reading, looking = both.split(FORECAST_COSTS)

        def forecast(damaged: DamagedFiles) -> ForecastCurve:
            with ensure_analysis(preflight, reading, damaged) as path:
                return _outlook(_question(path, preflight, looking))

        with_sound_cache(forecast, both.warn)
    return ""
