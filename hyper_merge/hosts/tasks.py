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
from hyper_merge.operations.fit.request import FitOrder
from hyper_merge.operations.merge.merge import run_merge
from hyper_merge.operations.merge.plan import LOOK_COSTS, Outlook, analysed, known_analysis, outlook
from hyper_merge.operations.merge.preflight import Preflight, examine
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runs.fit_records import styles_of
from hyper_merge.runs.manifest import load_run
from hyper_merge.runtime.progress import Control

LOOK: Final = "the look at the files"
"""Its job's title."""


@contextmanager
def turn(host: Host, task: str, control: Control) -> Iterator[Control]:
    """A turn of the host's for a task; gives a control that tells host and job, and hears both."""
    with host.running(task) as hosts:
        both = control.joined(hosts)
        both.step("starting", 0.0)
        yield both


def merge(
    host: Host, asked: Callable[[], Recipe], save_styles: bool, task: str, control: Control
) -> str:
    """Merges, and saves a style per checkpoint if that is wished; returns the run's name."""
    with turn(host, task, control) as both:
        folders = host.folders()
        preflight = examine(asked(), folders)
        for warning in preflight.warnings:
            both.warn(warning)
        name = run_merge(preflight, both, folders).place.run
        host.refresh()
        if save_styles:
            _save(host, styles_of(load_run(folders, name)), "merge", both)
    return name


def fit(
    host: Host, asked: Callable[[], FitOrder], save_styles: bool, task: str, control: Control
) -> str:
    """Fits a checkpoint onto a run, and saves its style if that is wished; returns the run's name."""
    with turn(host, task, control) as both:
        folders = host.folders()
        fitted = run_fit(asked(), folders, both)
        if fitted.topups:
            host.refresh()
        if save_styles:
            _save(host, dict([fitted.style(load_run(folders, fitted.run))]), "fit", both)
    return fitted.run


def _save(host: Host, styles: Mapping[str, str], what: str, control: Control) -> None:
    """Saves styles where the host has any; a refusal does not undo the work."""
    if not host.has_txt2img:
        return
    try:
        host.save_styles(styles)
    except OutputError as error:
        control.warn(f"The {what} is done, but its styles are not saved: {error}")


def known_outlook(host: Host, preflight: Preflight) -> Outlook | None:
    """What could be had, if the files have been looked at before."""
    path = known_analysis(preflight, host.folders())
    try:
        return None if path is None else _outlook(_question(path, preflight, Control()))
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
    control: Control = field(compare=False)


def _question(path: Path, preflight: Preflight, control: Control) -> _Question:
    separate = preflight.recipe.multipliers == "separate"
    weights = preflight.recipe.layer_weights
    changed = path.stat().st_mtime_ns
    return _Question(path, changed, preflight.rank_bytes, separate, weights, preflight, control)


@functools.lru_cache(maxsize=8)
def _outlook(question: _Question) -> Outlook:
    """What could be had, which takes seconds and is not found again while the analysis is the same."""
    return outlook(question.path, question.preflight, question.control)


def look(host: Host, asked: Callable[[], Preflight], task: str, control: Control) -> str:
    """Looks at the files in a turn of the host's, so that `known_outlook` knows what could be had."""
    with turn(host, task, control) as both:
        preflight = asked()
        reading, looking = both.split(LOOK_COSTS)
        path = analysed(preflight, host.folders(), reading)
        _outlook(_question(path, preflight, looking))
    return ""
