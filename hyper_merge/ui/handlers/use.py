"""Handles the tab "Use" between jobs: lists runs, shows what one offers, shows the results of jobs.

Handlers take and return plain values or `gr.update(...)`, no widgets. The first arguments come from the
wiring (the host, the process's jobs), the rest from the browser. A refusal becomes a message, never an
error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import gradio as gr

from hyper_merge.errors import HyperMergeError, RunError
from hyper_merge.hosts.host import Host
from hyper_merge.hosts.job_queue import MERGE, Jobs, JobStatus
from hyper_merge.runs.fit_records import load_fits
from hyper_merge.runs.run import Run, list_runs, load_run
from hyper_merge.runs.weighted_loras import checkpoint_names
from hyper_merge.ui.handlers.dropdowns import refill
from hyper_merge.ui.handlers.merge import watch_job
from hyper_merge.ui.html.common import format_job_status, format_message
from hyper_merge.ui.html.use import format_sliders, format_used_run

Panel = Literal["mix", "fit", "restore", "export", "safe", "extract"]

SAME_PRECISION: Final = "same as the hyper-model"
"""The precision of a restored checkpoint that is not changed."""

_PANELS: Final[tuple[Panel, ...]] = ("mix", "fit", "restore", "export", "safe", "extract")


@dataclass(frozen=True)
class PanelOutcome:
    """The result of a job that a panel of the tab "Use" started.

    Attributes:
        html: The text for the panel.
        tags: Prompt tags of a fit.
        fitted: Run and name of a fit.
        title: Title by which the host selects that run's hyper-model; empty if it cannot.
        wrote: Whether the host has new files to list.
    """

    html: str
    tags: str = ""
    fitted: tuple[str, str] | None = None
    title: str = ""
    wrote: bool = False


def list_usable_runs(host: Host, name: str | None, known: str, *picks: Any) -> tuple[Any, ...]:
    """Updates the list of runs, what the picked run offers, and the lists of checkpoints.

    A run that is new since the last call was just made, and is picked.

    Args:
        host: the program around the tab.
        name: the run that is shown.
        known: the runs that were listed before, as JSON.
        picks: the picked checkpoints to restore and to export, then those of the host's list.
    """
    restored, exported, *others = picks
    runs = {run.name: run for run in list_runs(host.folders())[0]}
    before = json.loads(known or "[]")
    new = [run for run in runs if before and run not in before]
    candidates = (*new[:1], name, *runs)
    picked = next((candidate for candidate in candidates if candidate in runs), None)
    checkpoints = list(host.checkpoints())
    return (
        gr.update(choices=list(runs), value=picked),
        json.dumps(list(runs)),
        *_offers(host, runs[picked] if picked else None, restored, exported),
        *(refill(checkpoints, checkpoint) for checkpoint in others),
    )


def use_run(host: Host, name: str, shown: str | None, *picks: Any) -> tuple[Any, ...]:
    """Picks a run, and clears the results of another one; says last where that run is gone.

    Args:
        host: the program around the tab.
        name: the run.
        shown: the run that is picked now.
        picks: those of `list_usable_runs`.
    """
    results: tuple[Any, ...] = (gr.update(),) * (len(_PANELS) + 1)
    if name != shown:
        results = (*("",) * len(_PANELS), gr.update(visible=False))
    return (*list_usable_runs(host, name, "", *picks), *results, format_vanished_run(host, name))


def format_vanished_run(host: Host, name: str) -> str:
    """Returns why a run that a page still shows cannot be used any more; "" where it can."""
    try:
        load_run(host.folders(), name)
    except HyperMergeError as error:
        return format_message("bad", str(error))
    return ""


def choose_used_run(
    host: Host, name: str | None, restored: str | None, exported: Sequence[str]
) -> tuple[Any, ...]:
    """Shows what a run offers, and clears the results of another one."""
    results = ("",) * len(_PANELS)
    try:
        offers = _offers(host, load_run(host.folders(), name or ""), restored, exported)
    except HyperMergeError as error:
        offers = (format_message("bad", str(error)), *_offers(host, None, None, ())[1:])
    return (*offers, *results, gr.update(visible=False))


def watch_job_in_both_tabs(
    jobs: Jobs, panel: Panel | None, refusal: str = ""
) -> Iterator[tuple[Any, ...]]:
    """Follows the running job in both tabs; only the tab that started it shows how it ended.

    Args:
        jobs: those of the process.
        panel: the panel whose button was pressed; None for none of the tab "Use".
        refusal: why no job was started; then only one that runs already is followed.

    Yields:
        Status, Stop button and message of the tab "Merge", then of the tab "Use"; the task that has
        ended; then the text of the panel, if there is one.
    """
    panel_updates: tuple[Any, ...] = () if panel is None else (gr.update(),)
    if refusal and (jobs.last is None or jobs.last.status.outcome != "running"):
        yield (*(gr.update(),) * 7, *panel_updates)
        return
    is_followed = False  # in the panel
    for updates in watch_job(jobs):
        status = jobs.last.status if jobs.last else None
        panel_updates = () if panel is None else (gr.update(),)
        is_here = status is not None and status.place == panel
        if status is not None and status.outcome == "running":
            if is_here:
                panel_updates, is_followed = (format_job_status(status),), True
            yield (*updates, *updates, gr.update(), *panel_updates)
        else:
            # A page may follow a job twice, after a refusal; then only one stream shows its end.
            if status is not None and is_here and is_followed:
                panel_updates = (_outcome(status).html,)
            elif refusal and panel is not None:
                panel_updates = ("",)  # that another job was running
            place = MERGE if status is None else status.place
            silent = ("", *updates[1:])
            merge_updates = updates if place == MERGE else silent
            use_updates = updates if place in _PANELS else silent
            task = "" if status is None else status.task
            yield (*merge_updates, *use_updates, task, *panel_updates)


def show_outcome(jobs: Jobs) -> tuple[Any, ...]:
    """Shows the result of a job that has ended in the panel that started it."""
    status = jobs.last.status if jobs.last else None
    if status is None or status.place not in _PANELS:
        return (gr.update(),) * (len(_PANELS) + 5)
    outcome = _outcome(status)
    texts = [outcome.html if panel == status.place else gr.update() for panel in _PANELS]
    wrote = status.task if outcome.wrote else gr.update()
    if status.place != "fit":
        return (*texts, *(gr.update(),) * 4, wrote)
    group = gr.update(visible=bool(outcome.tags))
    fitted = json.dumps(outcome.fitted or ["", ""])
    return (*texts, group, outcome.tags, fitted, outcome.title, wrote)


def hide_fit_tags() -> Any:
    """Hides the tags of an earlier fit."""
    return gr.update(visible=False)


def save_fit_style(host: Host, fitted: str) -> str:
    """Saves the style of the fit that is shown."""
    try:
        name, checkpoint = _run_and_name(fitted)
        run = load_run(host.folders(), name)
        fit = next((fit for fit in load_fits(run)[0] if fit.row.name == checkpoint), None)
        if fit is None:
            raise RunError(f"{checkpoint} is no longer among the fits of the run {run.name}")
        style, prompt = fit.style(run)
        host.save_styles({style: prompt})
    except HyperMergeError as error:
        return format_message("bad", str(error))
    return format_message("good", f"Saved the style {style}. Pick it in txt2img.")


def _run_and_name(fitted: str) -> tuple[str, str]:
    run, name = json.loads(fitted or '["", ""]')
    return str(run), str(name)


def _offers(
    host: Host, run: Run | None, restored: str | None, exported: Sequence[str]
) -> tuple[Any, ...]:
    """Returns text, sliders and title of a run, and updates of what can be restored and exported."""
    if run is None:
        empty = gr.update(choices=[], value=None)
        return (format_used_run(None), "", "", empty, gr.update(choices=[], value=[]))
    names = checkpoint_names(run)
    merged = [row.name for row in run.report.checkpoints]
    return (
        format_used_run(run),
        format_sliders(run),
        host.checkpoint_title(run.hyper_model) or "",
        gr.update(choices=list(names), value=restored if restored in names else names[0]),
        gr.update(choices=merged, value=[name for name in exported or () if name in merged]),
    )


def _outcome(status: JobStatus) -> PanelOutcome:
    """Returns the result of a job; its status if it has no result."""
    if isinstance(status.result, PanelOutcome):
        return status.result
    return PanelOutcome(format_job_status(status))
