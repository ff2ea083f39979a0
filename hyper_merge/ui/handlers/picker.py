"""Handles the picker: lists checkpoints, describes the picked ones and the plan of their merge.

Handlers take and return plain values or `gr.update(...)`, no widgets. The first arguments come from the
wiring (the host, the process's jobs), the rest from the browser. A refusal becomes a message, never an
error.
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
from hyper_merge.ui.form import Form
from hyper_merge.ui.form_fields import BASE_AVERAGE, PRESETS
from hyper_merge.ui.handlers.forecast import (
    NO_CURVE,
    offer_curve,
    show_curve,
    update_group_buttons,
)
from hyper_merge.ui.handlers.merge_request import has_name, preflight_form
from hyper_merge.ui.html.common import (
    format_checkpoints,
    format_forecast_notes,
    format_merge_plan,
    format_message,
)

ALL_FOLDERS: Final = "all folders"
TOP_FOLDER: Final = "top folder only"


def list_checkpoints(host: Host, picked: Sequence[str]) -> tuple[Any, Any, Any, Any]:
    """Updates checkpoints, folders and bases from the host's list, and the demo's button.

    Checkpoints that are gone stay picked; the table says that they are gone.
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
    """Returns the folders to add from: all of them, the top folder, and each folder below it."""
    folders = sorted({_folder(name) for name in names} - {""})
    if not folders:
        return [ALL_FOLDERS]
    top = [TOP_FOLDER] if any(not _folder(name) for name in names) else []
    return [ALL_FOLDERS, *top, *folders]


def add_folder(host: Host, picked: Sequence[str], folder: str) -> list[str]:
    """Returns the picked checkpoints and those of a folder, without hyper-models of earlier merges."""
    prefix = "" if folder == TOP_FOLDER else folder
    new = [
        name
        for name, path in host.checkpoints().items()
        if (folder == ALL_FOLDERS or _folder(name) == prefix) and average_id_of(path) is None
    ]
    return list(dict.fromkeys([*(picked or []), *new]))


def clear_selection() -> list[str]:
    """Returns an empty selection."""
    return []


def preset_ranks(word: str) -> str:
    """Returns the ranks of one of the form's presets."""
    return PRESETS[word]


def offers_demo(host: Host) -> bool:
    """Returns whether to offer demo checkpoints: in the app, while its folder has none."""
    return not host.has_txt2img and not host.checkpoints()


def show_plan(host: Host, groups: str, *values: Any) -> tuple[Any, ...]:
    """Describes the picked checkpoints and the merge that the form asks for.

    Args:
        host: the program around the tab.
        groups: the groups that have buttons now, as JSON.
        values: the values of the form.

    Returns:
        The table of checkpoints, the plan or why there can be none, the suggested name, the choice of
        a size, an update of the button for its curve, the dissimilar groups as JSON, updates of their buttons.
    """
    form = Form(*values)
    listed = host.checkpoints()
    names = form.checkpoints or []
    files = [_inspect(name, listed) for name in names]
    hashes = {name: host.known_hash(name) for name in names}
    name = suggest_name(names) if names else ""
    table, placeholder = format_checkpoints(names, files, hashes), gr.update(placeholder=name)
    problem = _problem(files)
    if problem is not None:
        buttons = update_group_buttons(names, None, groups)
        return (table, problem, placeholder, *NO_CURVE, *buttons)
    plan, plot, forecast = _plan_and_forecast(host, form)
    buttons = update_group_buttons(names, forecast, groups)
    return (table, plan, placeholder, *plot, *buttons)


def _problem(files: Sequence[InspectedFile]) -> str | None:
    """Returns why there is no plan; None if there can be one."""
    if len(files) < 2:
        return format_message("info", "Pick one more checkpoint.") if files else ""
    if any(file.problem for file in files):
        return format_message(
            "bad", "Some of these checkpoints cannot be merged; the table says why."
        )
    return None


def _plan_and_forecast(host: Host, form: Form) -> tuple[str, tuple[Any, Any], ForecastCurve | None]:
    """Returns the plan or why there is none, updates of plot and button, and the forecast."""
    try:
        preflight = preflight_form(host, form)
    except HyperMergeError as error:
        return format_message("bad", str(error)), *_without_size(host, form)
    forecast = known_forecast(preflight)
    size = forecast.requested_size(preflight) if forecast else None
    plan = _plan(form, preflight, size)
    if forecast is not None:
        plan += format_forecast_notes(forecast, preflight.recipe, size)
    text = form.ranks
    curve = show_curve(text, forecast, size) if forecast else offer_curve(text, preflight)
    return plan, curve, forecast


def _without_size(host: Host, form: Form) -> tuple[tuple[Any, Any], ForecastCurve | None]:
    """Returns the curve without a mark, so that it stays while ranks are being typed."""
    try:
        forecast = known_forecast(preflight_form(host, replace(form, ranks="1")))
    except HyperMergeError:
        return NO_CURVE, None
    return (NO_CURVE if forecast is None else show_curve(form.ranks, forecast, None)), forecast


def _plan(form: Form, preflight: Preflight, size: int | None) -> str:
    try:
        preflight, place = with_free_name(preflight, named=has_name(form))
        return format_merge_plan(preflight, place, size)
    except SameMergeError as error:
        text = (
            f"Made already: this is the run {error.run}. Change settings or name for another one."
        )
        return format_message("good", text)
    except HyperMergeError as error:  # a checkpoint may have been removed just now
        return format_message("bad", str(error))


def _inspect(name: str, listed: Mapping[str, Path]) -> InspectedFile:
    if name not in listed:
        return _absent(name, "no longer in the list; press Refresh")
    path = listed[name]
    try:
        status = path.stat()
    except FileNotFoundError:
        return _absent(name, "file not found; press Refresh")
    except OSError:
        return inspect_files(path)
    return _inspect_file(path, status.st_size, status.st_mtime_ns)


def _absent(name: str, problem: str) -> InspectedFile:
    return InspectedFile(name, Path(name), None, 0, "", "", None, problem)


@functools.lru_cache(maxsize=256)
def _inspect_file(path: Path, _size: int, _changed: int) -> InspectedFile:
    """Inspects a file once for as long as it stays the same."""
    return inspect_files(path)


def _folder(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[0]
