"""Starting a merge, following it, stopping it.

Handlers: plain values in, plain values or `gr.update(...)` out, no widgets. The first arguments come
from the wiring (the host, the process's jobs), the rest from the browser. What is refused becomes a
message; it never leaves as an error.
"""

from __future__ import annotations

import functools
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
from hyper_merge.ui.form import Form, recipe_of
from hyper_merge.ui.handlers.merge_request import prepare_merge
from hyper_merge.ui.handlers.result import NOTHING, show_run
from hyper_merge.ui.html.common import format_job_status, format_message, format_refusal

_TICK: Final = 0.5  # seconds between looks at a job that runs


def start_merge(host: Host, jobs: Jobs, *values: Any) -> str:
    """Starts the merge, or says why not; `watch` follows it.

    Two handlers, for gradio keeps a second click waiting until the first one is answered.
    """
    form = Form(*values)
    try:
        preflight, _ = prepare_merge(host, form)
        form = replace(form, name=preflight.recipe.name)
        asked = functools.partial(_recipe_now, host, form)
        work = functools.partial(merge_task, host, asked, form.save_styles)
        jobs.start(form.name, work, host.log)
    except HyperMergeError as error:
        return format_refusal(error)
    return ""


def start_demo(host: Host, jobs: Jobs) -> str:
    """Starts making small checkpoints where there are none."""
    try:
        jobs.start("the demo's checkpoints", functools.partial(_make_demo, host), host.log)
    except HyperMergeError as error:
        return format_refusal(error)
    return ""


def watch_merge(jobs: Jobs) -> Iterator[tuple[str, Any, Any]]:
    """Follows the job that runs, or says how the last one ended: status, Stop button, message.

    A message that something was running goes when that has ended; others stay.
    """
    job, message = jobs.last, gr.update()
    if job is None:
        yield "", gr.update(interactive=False), message
        return
    now = job.standing
    while now.outcome == "running":
        yield format_job_status(now), gr.update(interactive=not now.stopping), message
        job.wait(_TICK)
        now = job.standing
        if now.outcome != "running":
            message = ""
    yield format_job_status(now), gr.update(interactive=False), message


def stop_job(jobs: Jobs) -> str:
    """Asks the job that runs to end."""
    if jobs.last is None or jobs.last.standing.outcome != "running":
        return format_message("info", "Nothing is running.")
    jobs.last.stop()
    return ""


def show_merge_result(host: Host, jobs: Jobs) -> tuple[Any, ...]:
    """What the result panel shows once a job has ended; nothing new unless it made a run."""
    now = _last(jobs)
    if now is None or now.outcome != "done" or not now.result or not isinstance(now.result, str):
        return (gr.update(),) * len(NOTHING)
    return show_run(host, now.result)


def pick_demo_checkpoints(host: Host, jobs: Jobs) -> tuple[Any, Any]:
    """The demo's checkpoints, picked, and ranks that become them."""
    now = _last(jobs)
    if now is None or now.outcome != "done":
        return gr.update(), gr.update()
    names = list(host.checkpoints())
    return gr.update(choices=names, value=names), ", ".join(map(str, DEMO_RANKS))


def _recipe_now(host: Host, form: Form) -> Recipe:
    """What the form asks for, by the host's list as it is now."""
    return recipe_of(form, host.checkpoints(), host.folders())


def _make_demo(host: Host, _task: str, progress: Progress) -> str:
    make_family(host.folders().models, progress)
    host.refresh()
    return ""


def _last(jobs: Jobs) -> JobStatus | None:
    return jobs.last.standing if jobs.last else None
