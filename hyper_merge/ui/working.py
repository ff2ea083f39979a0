"""The long work of the tab and of the API: a merge, a fit, each in a turn of the host's.

What is asked for is made anew when the turn comes: the host's list may have changed meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from hyper_merge.control import Control
from hyper_merge.errors import OutputError
from hyper_merge.fit import run_fit
from hyper_merge.fit_job import FitOrder
from hyper_merge.hosts.host import Host
from hyper_merge.merge import run_merge
from hyper_merge.preflight import examine
from hyper_merge.recipe import Recipe
from hyper_merge.runs import load_run
from hyper_merge.ui.results import styles_of


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
