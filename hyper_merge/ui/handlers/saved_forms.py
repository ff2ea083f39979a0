"""Handles forms that are kept: named presets on disk, and what the browser remembers of the last visit.

Handlers take and return plain values or `gr.update(...)`, no widgets. The first arguments come from the
wiring (the host, the process's jobs), the rest from the browser. A refusal becomes a message, never an
error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import gradio as gr

from hyper_merge.errors import HyperMergeError
from hyper_merge.hosts.host import Host
from hyper_merge.hosts.job_queue import Jobs
from hyper_merge.runs.presets import delete_preset, load_presets, save_preset
from hyper_merge.runtime.checked_json import parse_json
from hyper_merge.runtime.devices import list_devices
from hyper_merge.ui.form import Form
from hyper_merge.ui.handlers.dropdowns import refill
from hyper_merge.ui.html.common import format_message
from hyper_merge.ui.saved_form import default_form, form_from_plain, form_to_plain

_UNCHANGED = tuple(gr.update() for _ in fields(Form))


def restore_form(host: Host, jobs: Jobs, kept: str, *values: Any) -> tuple[Any, ...]:
    """Returns the form's values on a page that opens.

    They are those of the job that runs; else those that were there last, of the last job or of this browser.

    Args:
        host: the program around the tab.
        jobs: those of the process.
        kept: what this browser remembers, as JSON: `time` in seconds, `form` with what was changed.
        values: those of the form as the page has it.
    """
    known = [(job, job.form) for job in jobs.known if isinstance(job.form, Form)]
    saved = _parse_kept(kept)
    since = saved.get("time")
    for job, form in known[:1]:
        is_newer = isinstance(since, int | float) and since > job.started
        if job.status.outcome == "running" or not is_newer:
            return form.widget_values()
    if not saved.get("form"):
        return _UNCHANGED
    form = form_from_plain(
        saved["form"], Form.from_widgets(*values), list(host.checkpoints()), list_devices()
    )
    return form.widget_values()


def list_presets(host: Host, picked: str | None) -> tuple[Any, str]:
    """Updates the list of presets; a message where they cannot be read."""
    try:
        return refill(list(load_presets(host.folders().runs)), picked), ""
    except HyperMergeError as error:
        return gr.update(choices=[], value=None), _format_error(error)


def load_named_preset(host: Host, name: str | None) -> tuple[Any, ...]:
    """Returns the form's values by a preset, its name, and a message."""
    try:
        presets = load_presets(host.folders().runs)
    except HyperMergeError as error:
        return (*_UNCHANGED, gr.update(), _format_error(error))
    if not name or name not in presets:
        text = "Choose a preset first." if not name else f"There is no preset {name} any more."
        return (*_UNCHANGED, gr.update(), format_message("info", text))
    listed = list(host.checkpoints())
    form = form_from_plain(presets[name], default_form(host), listed, list_devices())
    gone = sum(checkpoint not in listed for checkpoint in form.checkpoints)
    text = f"Loaded {name}."
    if gone:
        text += f" {gone} of its checkpoints are no longer in the list."
    message = format_message("info" if gone else "good", text)
    return (*form.widget_values(), name, message)


def save_named_preset(host: Host, name: str | None, *values: Any) -> tuple[Any, str]:
    """Saves the form as a preset; updates the list, and says so."""
    folder = host.folders().runs
    try:
        name = save_preset(folder, name or "", form_to_plain(Form.from_widgets(*values)))
        names = list(load_presets(folder))
    except HyperMergeError as error:
        return gr.update(), _format_error(error)
    return gr.update(choices=names, value=name), format_message("good", f"Saved {name}.")


def delete_named_preset(host: Host, name: str | None) -> tuple[Any, str]:
    """Deletes a preset; updates the list, and says so."""
    if not name:
        return gr.update(), format_message("info", "Choose a preset first.")
    folder = host.folders().runs
    try:
        delete_preset(folder, name)
        names = list(load_presets(folder))
    except HyperMergeError as error:
        return gr.update(), _format_error(error)
    return gr.update(choices=names, value=None), format_message("good", f"Deleted {name}.")


def _parse_kept(text: str) -> Mapping[str, Any]:
    try:
        kept = parse_json(text or "{}")
    except ValueError:
        return {}
    return kept if isinstance(kept, dict) else {}


def _format_error(error: HyperMergeError) -> str:
    return format_message("bad", str(error))
