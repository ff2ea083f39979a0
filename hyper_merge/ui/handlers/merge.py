"""Handles the tab "Merge": starts a merge, follows it, stops it.

Handlers take and return plain values or `gr.update(...)`, no widgets. The first arguments come from the
wiring (the host, the process's jobs), the rest from the browser. A refusal becomes a message, never an
error.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import gradio as gr

from hyper_merge.errors import HyperMergeError
from hyper_merge.hosts.host import Host
from hyper_merge.hosts.job_queue import Jobs, JobStatus
from hyper_merge.hosts.tasks import merge_task
from hyper_merge.operations.demo import DEMO_RANKS, make_family
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.progress import Progress
from hyper_merge.ui.form import Form, recipe_from_form
from hyper_merge.ui.handlers.merge_request import prepare_merge
from hyper_merge.ui.handlers.result import NOTHING, is_deleted, show_run
from hyper_merge.ui.html.common import format_job_status, format_message, format_refusal

_TICK: Final = 0.5  # seconds between looks at a job that runs


def start_merge(host: Host, jobs: Jobs, *values: Any) -> str:
    """Starts the merge; returns why not, or "" if it started. `watch_job` follows it.

    These are two handlers since gradio keeps a second click waiting until the first one is answered.
    """
    form = Form.from_widgets(*values)
    try:
        preflight, place = prepare_merge(host, form)
        recipe = functools.partial(_recipe_now, host, replace(form, name=preflight.recipe.name))
        work = functools.partial(merge_task, host, recipe, form.save_styles)
        jobs.start(place.run, work, host.log, form=form)
    except HyperMergeError as error:
        return format_refusal(error)
    return ""


def start_demo(host: Host, jobs: Jobs) -> str:
    """Starts making the demo's checkpoints; returns why not, or "" if it started."""
    try:
        jobs.start("demo checkpoints", functools.partial(_make_demo, host), host.log)
    except HyperMergeError as error:
        return format_refusal(error)
    return ""


def watch_job(jobs: Jobs) -> Iterator[tuple[str, Any, Any]]:
    """Follows the running job, or shows how the last one ended.

    The message that a job was running is removed when that job has ended; others stay.

    Yields:
        Status, Stop button, message.
    """
    job, message = jobs.last, gr.update()
    if job is None:
        yield "", gr.update(interactive=False), message
        return
    status = job.status
    while status.outcome == "running":
        yield format_job_status(status), gr.update(interactive=not status.stopping), message
        job.wait(_TICK)
        status = job.status
        if status.outcome != "running":
            message = ""
    yield format_job_status(status), gr.update(interactive=False), message


def stop_job(jobs: Jobs) -> str:
    """Asks the running job to end."""
    if jobs.last is None or jobs.last.status.outcome != "running":
        return format_message("info", "Nothing is running.")
    jobs.last.stop()
    return ""


def show_merge_result(host: Host, jobs: Jobs) -> tuple[Any, ...]:
    """Shows the run that a job has made, once it has ended; changes nothing if it made none.

    A run that has been deleted since is none: a page that opens later has no error.
    """
    status = _last_status(jobs)
    name = status.result if status is not None and status.outcome == "done" else ""
    if not isinstance(name, str) or not name or is_deleted(host, name):
        return (gr.update(),) * len(NOTHING)
    return show_run(host, name, is_new=True)


def pick_demo_checkpoints(host: Host, jobs: Jobs, refusal: str) -> tuple[Any, Any]:
    """Picks the demo's checkpoints, and ranks that suit them, unless their making was refused."""
    status = _last_status(jobs)
    if refusal or status is None or status.outcome != "done":
        return gr.update(), gr.update()
    return json.dumps(list(host.checkpoints())), ", ".join(map(str, DEMO_RANKS))


def _recipe_now(host: Host, form: Form) -> Recipe:
    """Returns the form's recipe, by the host's list as it is now."""
    return recipe_from_form(form, host.checkpoints(), host.folders())


def _make_demo(host: Host, _task: str, progress: Progress) -> str:
    make_family(host.folders().models, progress)
    host.refresh()
    return ""


def _last_status(jobs: Jobs) -> JobStatus | None:
    return jobs.last.status if jobs.last else None
