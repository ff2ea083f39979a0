"""Picking checkpoints, and what a merge of them would take.

Handlers: plain values in, plain values or `gr.update(...)` out, no widgets. The first arguments come
from the wiring (the host, the process's jobs), the rest from the browser. What is refused becomes a
message; it never leaves as an error.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import gradio as gr

from hyper_merge.errors import HyperMergeError, SameMergeError
from hyper_merge.hosts.host import Host
from hyper_merge.hosts.tasks import known_forecast
from hyper_merge.operations.inspect import InspectedFile, inspect_files
from hyper_merge.operations.merge.naming import suggest_name, with_free_name
from hyper_merge.operations.merge.plan import ForecastCurve
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.runs.folders import average_id_of
from hyper_merge.ui.form import BASE_AVERAGE, PRESETS, Form
from hyper_merge.ui.handlers.forecast import NO_CURVE, update_curve, update_group_buttons
from hyper_merge.ui.handlers.merge_request import has_name, preflight_form
from hyper_merge.ui.html.common import (
    format_checkpoints,
    format_forecast_notes,
    format_merge_plan,
    format_message,
)

ALL_FOLDERS: Final = "all folders"
TOP_FOLDER: Final = "without a folder"


def list_checkpoints(host: Host, picked: Sequence[str]) -> tuple[Any, Any, Any, Any]:
    """Choices of checkpoints, folders and bases from the host's list, and the demo's button.

    Checkpoints that are gone stay picked: the table says so.
    """
    names = list(host.checkpoints())
    gone = [name for name in picked or [] if name not in names]
    folders = checkpoint_folders(names)
    return (
        gr.update(choices=[*names, *gone]),
        gr.update(choices=folders, value=folders[0]),
        gr.update(choices=[BASE_AVERAGE, *names]),
        gr.update(visible=offers_demo(host)),
    )


def checkpoint_folders(names: Sequence[str]) -> list[str]:
    """What can be added at once: all, those in no folder, and every folder."""
    folders = sorted({_folder(name) for name in names} - {""})
    if not folders:
        return [ALL_FOLDERS]
    top = [TOP_FOLDER] if any(not _folder(name) for name in names) else []
    return [ALL_FOLDERS, *top, *folders]


def add_folder(host: Host, picked: Sequence[str], folder: str) -> list[str]:
    """The picked checkpoints and those of a folder, less the hyper-models that we made."""
    wanted = "" if folder == TOP_FOLDER else folder
    new = [
        name
        for name, path in host.checkpoints().items()
        if (folder == ALL_FOLDERS or _folder(name) == wanted) and average_id_of(path) is None
    ]
    return list(dict.fromkeys([*(picked or []), *new]))


def clear_selection() -> list[str]:
    """An empty selection."""
    return []


def preset_ranks(word: str) -> str:
    """The ranks of one of the form's presets."""
    return PRESETS[word]


def offers_demo(host: Host) -> bool:
    """Whether there is nothing to merge, and a place to make something in."""
    return not host.has_txt2img and not host.checkpoints()


def show_plan(host: Host, groups: str, *values: Any) -> tuple[Any, ...]:
    """The picked checkpoints' table, what a merge takes or why it cannot be, an empty name's hint.

    And what could be had for which size, with a button for each of the unlike groups.

    Args:
        host: of the tab.
        groups: those that have buttons now, as JSON.
        values: of the form.
    """
    form = Form(*values)
    listed = host.checkpoints()
    rows = [(name, _row(name, listed)) for name in form.checkpoints or []]
    hashes = {name: host.known_hash(name) for name, _ in rows}
    name = suggest_name(form.checkpoints) if rows else ""
    table, hint = format_checkpoints(rows, hashes), gr.update(placeholder=name)
    problem = _problem([row for _, row in rows])
    if problem is not None:
        buttons = update_group_buttons(form.checkpoints or [], None, groups)
        return (table, problem, hint, *NO_CURVE, *buttons)
    said, drawn, found = _looked_at(host, form)
    return (table, said, hint, *drawn, *update_group_buttons(form.checkpoints, found, groups))


def _problem(rows: Sequence[InspectedFile]) -> str | None:
    """Why there is nothing to look at."""
    if len(rows) < 2:
        return format_message("info", "Pick one more checkpoint.") if rows else ""
    if any(row.problem for row in rows):
        return format_message("bad", "Not all of these can be merged; the table says why.")
    return None


def _looked_at(host: Host, form: Form) -> tuple[str, tuple[Any, Any], ForecastCurve | None]:
    """What a merge takes or why it cannot be; the curve; what could be had."""
    try:
        preflight = preflight_form(host, form)
    except HyperMergeError as error:
        return format_message("bad", str(error)), *_without_size(host, form)
    found = known_forecast(host, preflight)
    asked = found.asked(preflight) if found else None
    said = _plan(host, form, preflight, asked)
    if found is not None:
        said += format_forecast_notes(found, preflight.recipe, asked)
    return said, update_curve(found, asked), found


def _without_size(host: Host, form: Form) -> tuple[tuple[Any, Any], ForecastCurve | None]:
    """The curve alone, so that it stays while a size is half typed."""
    try:
        found = known_forecast(host, preflight_form(host, replace(form, ranks="1")))
    except HyperMergeError:
        return NO_CURVE, None
    return (NO_CURVE if found is None else update_curve(found, None)), found


def _plan(host: Host, form: Form, preflight: Preflight, asked: int | None) -> str:
    try:
        preflight, place = with_free_name(preflight, host.folders(), named=has_name(form))
    except SameMergeError as error:
        return format_message("info", str(error))
    except HyperMergeError as error:
        return format_message("bad", str(error))
    return format_merge_plan(preflight, place, asked)


def _row(name: str, listed: Mapping[str, Path]) -> InspectedFile:
    if name not in listed:
        return _absent(name, "no longer in the list; press Refresh")
    path = listed[name]
    try:
        status = path.stat()
    except FileNotFoundError:
        return _absent(name, "no longer there; press Refresh")
    except OSError:
        return inspect_files(path)
    return _row_of(path, status.st_size, status.st_mtime_ns)


def _absent(name: str, problem: str) -> InspectedFile:
    return InspectedFile(name, Path(name), None, 0, "", "", None, problem)


@functools.lru_cache(maxsize=256)
def _row_of(path: Path, _size: int, _changed: int) -> InspectedFile:
    """A look at a file, which is not repeated while the file stays the same."""
    return inspect_files(path)


def _folder(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[0]
