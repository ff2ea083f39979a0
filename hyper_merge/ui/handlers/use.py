"""The tab "Use" between jobs: which run, what it offers, what a job has left to show.

Handlers: plain values in, plain values or `gr.update(...)` out, no widgets. The first arguments come
from the wiring (the host, the process's jobs), the rest from the browser. What is refused becomes a
message; it never leaves as an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import gradio as gr

from hyper_merge.errors import HyperMergeError, RunError
from hyper_merge.hosts.host import Host
from hyper_merge.hosts.job_queue import Jobs, JobStatus
from hyper_merge.runs.fit_records import load_fits
from hyper_merge.runs.manifest import Run, list_runs, load_run
from hyper_merge.runs.weighted_loras import checkpoint_names
from hyper_merge.ui.handlers.dropdowns import refill
from hyper_merge.ui.handlers.merge import watch_merge
from hyper_merge.ui.handlers.result import explain_sent_prompt
from hyper_merge.ui.html.common import format_job_status, format_message
from hyper_merge.ui.html.use import format_sliders, format_used_run

Panel = Literal["mix", "fit", "restore", "export", "safe", "extract"]

SAME_PRECISION: Final = "as the hyper-model"
"""Of a checkpoint that comes back; others are those of `RestoreOrder`."""

_PANELS: Final[tuple[Panel, ...]] = ("mix", "fit", "restore", "export", "safe", "extract")


@dataclass(frozen=True)
class PanelOutcome:
    """What a job gave.

    Attributes:
        said: HTML.
        tags: Of a fit.
        fitted: Run and name of a fit.
        title: By what the host selects that run's hyper-model; empty where it cannot.
        wrote: Whether the host has new files to list.
    """

    said: str
    tags: str = ""
    fitted: tuple[str, str] | None = None
    title: str = ""
    wrote: bool = False


def list_usable_runs(host: Host, name: str | None, known: str, *picks: Any) -> tuple[Any, ...]:
    """The runs as they are now, what the picked one offers, and the host's checkpoints.

    A run that has come since is picked: it was just made.

    Args:
        host: whose folders they are in.
        name: of the run that is shown.
        known: the runs that were listed before.
        picks: what is picked to be restored and exported, then of the host's checkpoints.
    """
    restored, exported, *others = picks
    found, _ = list_runs(host.folders())
    names = [run.name for run in found]
    before = json.loads(known or "[]")
    new = [each for each in names if before and each not in before]
    picked = next((each for each in (*new[:1], name) if each in names), next(iter(names), None))
    run = next((each for each in found if each.name == picked), None)
    listed = list(host.checkpoints())
    return (
        gr.update(choices=names, value=picked),
        json.dumps(names),
        *_offered(host, run, restored, exported),
        *(refill(listed, each) for each in others),
    )


def choose_used_run(
    host: Host, name: str | None, restored: str | None, exported: Sequence[str]
) -> tuple[Any, ...]:
    """What a run offers, and nothing of what was said of another."""
    said = ("",) * len(_PANELS)
    try:
        offered = _offered(host, load_run(host.folders(), name or ""), restored, exported)
    except HyperMergeError as error:
        offered = (format_message("bad", str(error)), *_offered(host, None, None, ())[1:])
    return (*offered, *said, gr.update(visible=False))


def watch_job_in_both_tabs(jobs: Jobs, panel: Panel | None) -> Iterator[tuple[Any, ...]]:
    """Follows the job that runs in both tabs; how it ended says the one in which it was begun.

    Status, Stop button and message of the tab "Merge", then of this one; then the panel with the
    button that was pressed, if the job is its.
    """
    own: tuple[Any, ...]
    is_followed = False  # in the panel
    for shown in watch_merge(jobs):
        now = jobs.last.standing if jobs.last else None
        own = () if panel is None else (gr.update(),)
        is_here = now is not None and now.place == panel
        if now is not None and now.outcome == "running":
            if is_here:
                own, is_followed = (format_job_status(now),), True
            yield (*shown, *shown, *own)
        else:
            # A page may follow a job twice, after a refusal, and only one of both shows its end then.
            if now is not None and is_here and is_followed:
                own = (_outcome(now).said,)
            is_ours = now is not None and now.place in _PANELS
            yield (*_if(not is_ours, shown), *_if(is_ours, shown), *own)


def show_outcome(jobs: Jobs, seen: str) -> tuple[Any, ...]:
    """What the panels show once a job has ended; nothing new unless it was one of theirs.

    Args:
        jobs: the process's.
        seen: the task that was shown last: why another one is refused stays in its place.
    """
    now = jobs.last.standing if jobs.last else None
    if now is None or now.place not in _PANELS or now.task == seen:
        return (gr.update(),) * (len(_PANELS) + 6)
    outcome = _outcome(now)
    said = [outcome.said if panel == now.place else gr.update() for panel in _PANELS]
    wrote = now.task if outcome.wrote else gr.update()
    if now.place != "fit":
        return (*said, *(gr.update(),) * 4, wrote, now.task)
    group = gr.update(visible=bool(outcome.tags))
    fitted = json.dumps(outcome.fitted or ["", ""])
    return (*said, group, outcome.tags, fitted, outcome.title, wrote, now.task)


def hide_fit_tags() -> Any:
    """The tags of an earlier fit go."""
    return gr.update(visible=False)


def explain_sent_fit(fitted: str, title: str) -> str:
    """What is left to do after the tags of a fit were sent."""
    return explain_sent_prompt(_pair(fitted)[0], title)


def save_fit_style(host: Host, fitted: str) -> str:
    """Saves the style of the fit that is shown."""
    try:
        name, checkpoint = _pair(fitted)
        run = load_run(host.folders(), name)
        found = next((each for each in load_fits(run)[0] if each.row.name == checkpoint), None)
        if found is None:
            raise RunError(f"{checkpoint} is no longer among the fits of the run {run.name}")
        style, prompt = found.style(run)
        host.save_styles({style: prompt})
    except HyperMergeError as error:
        return format_message("bad", str(error))
    return format_message("good", f"The style {style} is saved. Pick it in txt2img.")


def _pair(fitted: str) -> tuple[str, str]:
    run, name = json.loads(fitted or '["", ""]')
    return str(run), str(name)


def _offered(
    host: Host, run: Run | None, restored: str | None, exported: Sequence[str]
) -> tuple[Any, ...]:
    """About the run, sliders, title of the hyper-model, what can be restored and exported."""
    if run is None:
        empty = gr.update(choices=[], value=None)
        return (format_used_run(None), "", "", empty, gr.update(choices=[], value=[]))
    names, own = checkpoint_names(run), [row.name for row in run.report.checkpoints]
    return (
        format_used_run(run),
        format_sliders(run),
        host.checkpoint_title(run.hyper_model) or "",
        gr.update(choices=list(names), value=restored if restored in names else names[0]),
        gr.update(choices=own, value=[name for name in exported or () if name in own]),
    )


def _outcome(now: JobStatus) -> PanelOutcome:
    """What a job gave; how it ended, if it gave nothing."""
    return (
        now.result if isinstance(now.result, PanelOutcome) else PanelOutcome(format_job_status(now))
    )


def _if(own: bool, shown: tuple[str, Any, Any]) -> tuple[str, Any, Any]:
    return shown if own else ("", *shown[1:])
