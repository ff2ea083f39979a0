"""Earlier runs: open, copy, compare, delete; and the cache.

Handlers: plain values in, plain values or `gr.update(...)` out, no widgets. The first arguments come
from the wiring (the host, the process's jobs), the rest from the browser. What is refused becomes a
message; it never leaves as an error.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import gradio as gr

from hyper_merge.errors import HyperMergeError
from hyper_merge.hosts.host import Host
from hyper_merge.hosts.job_queue import Jobs
from hyper_merge.operations.cache import clear_cache, format_cache
from hyper_merge.runs.fit_records import styles_of
from hyper_merge.runs.manifest import Run, delete_run, files_of, list_runs, load_run
from hyper_merge.ui.form import Form, form_of
from hyper_merge.ui.handlers.dropdowns import refill
from hyper_merge.ui.html.common import format_hint, format_message
from hyper_merge.ui.html.runs import format_file_list, format_run_comparison, format_run_list


def list_earlier_runs(
    host: Host, first: str | None, second: str | None
) -> tuple[str, Any, Any, str]:
    """The table of runs, the two pickers with what they show if it is still there, the cache."""
    folders = host.folders()
    found, problems = list_runs(folders)
    names = [run.name for run in found]
    return (
        format_run_list(found, problems),
        refill(names, first, next(iter(names), None)),
        refill(names, second, next(iter(names[1:]), None)),
        format_hint(format_cache(folders)),
    )


def copy_settings(host: Host, name: str | None) -> tuple[Any, ...]:
    """The form's values for another merge like a run, and a message."""
    try:
        recipe = load_run(host.folders(), name or "").recipe
    except HyperMergeError as error:
        return (*(gr.update() for _ in fields(Form)), _refused(error))
    listed = host.checkpoints()
    form = form_of(recipe, listed, save_styles=host.defaults().save_styles and host.has_txt2img)
    gone = len(recipe.models) - len(form.checkpoints)
    text = f"The settings of {name} are in the form."
    if gone:
        text += f" {gone} of its checkpoints are no longer in the list."
    values = (getattr(form, field.name) for field in fields(Form))
    return (*values, format_message("info" if gone else "good", text))


def compare_runs(host: Host, first: str | None, second: str | None) -> str:
    """Two runs side by side."""
    try:
        one, other = (load_run(host.folders(), name or "") for name in (first, second))
    except HyperMergeError as error:
        return _refused(error)
    return format_run_comparison(one, other)


def ask_to_delete_run(host: Host, jobs: Jobs, name: str | None) -> tuple[str, Any, Any, str]:
    """The files and styles that would go, the two buttons, and the run that is asked about.

    Not while a merge runs, which may be adding LoRAs to the run's hyper-model.
    """
    try:
        jobs.require_idle()
        run = load_run(host.folders(), name or "")
        files = files_of(run, host.folders())
    except HyperMergeError as error:
        return _answered(_refused(error))
    question = f"Deleting the run {run.name} removes these {len(files)} files"
    styles = len(_styles(host, run))
    question += f" and {styles} styles:" if styles else ":"
    return (format_file_list(files, question), *_buttons(visible=True), run.name)


def delete_confirmed_run(host: Host, jobs: Jobs, asked: str | None) -> tuple[str, Any, Any, str]:
    """Deletes the files and styles of the run that was asked about, and says what is gone."""
    try:
        jobs.require_idle()
        run = load_run(host.folders(), asked or "")
        styles = _styles(host, run)
        gone = delete_run(run, host.folders())
    except HyperMergeError as error:
        return _answered(_refused(error))
    host.refresh()
    said = format_message("good", f"{len(gone)} files of {asked} are deleted.")
    try:
        host.remove_styles(styles)
    except HyperMergeError as error:
        said += _refused(error)
    return _answered(said)


def cancel_deletion() -> tuple[str, Any, Any, str]:
    """Nothing is deleted."""
    return _answered("")


def clear_idle_cache(host: Host, jobs: Jobs) -> str:
    """Empties the cache unless a merge runs, which may need it; says what that freed."""
    try:
        jobs.require_idle()
        return format_message("good", clear_cache(host.folders()))
    except HyperMergeError as error:
        return _refused(error)


def _styles(host: Host, run: Run) -> set[str]:
    return set(styles_of(run)) & host.styles()


def _answered(said: str) -> tuple[str, Any, Any, str]:
    return (said, *_buttons(visible=False), "")


def _buttons(*, visible: bool) -> tuple[Any, Any]:
    return gr.update(visible=visible), gr.update(visible=visible)


def _refused(error: HyperMergeError) -> str:
    return format_message("bad", str(error))
