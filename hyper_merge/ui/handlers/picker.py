"""Handles the picker: what can be picked, and the plan of the picked checkpoints' merge.

Handlers take and return plain values or `gr.update(...)`, no widgets. The first arguments come from the
wiring (the host, the process's jobs), the rest from the browser. A refusal becomes a message, never an
error.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import gradio as gr

from hyper_merge.errors import HyperMergeError, SameMergeError
from hyper_merge.hosts.host import Host
from hyper_merge.hosts.tasks import known_forecast
from hyper_merge.operations.catalogue import Catalogue
from hyper_merge.operations.merge.naming import suggest_name, with_free_name
from hyper_merge.operations.merge.plan import ForecastCurve
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.ui.form import Form, parse_picks
from hyper_merge.ui.form_fields import BASE_AVERAGE
from hyper_merge.ui.handlers.forecast import (
    NO_CURVE,
    offer_curve,
    show_curve,
    update_group_buttons,
)
from hyper_merge.ui.handlers.merge_request import has_name, preflight_form
from hyper_merge.ui.html.common import (
    format_forecast_notes,
    format_merge_plan,
    format_message,
)

_MOMENT: Final = 0.4  # seconds in which files are inspected before a page is told what is known


def list_checkpoints(host: Host, catalogue: Catalogue) -> tuple[str, Any, Any]:
    """Returns the host's list with what is known of each file, and updates bases and demo button.

    No file is read: the page asks for the facts that it lacks by `inspect_some`.
    """
    listed = host.checkpoints()
    return (
        _to_json(host, catalogue, listed),
        gr.update(choices=[BASE_AVERAGE, *listed]),
        gr.update(visible=offers_demo(host)),
    )


def inspect_some(host: Host, catalogue: Catalogue, picked: str) -> str:
    """Inspects files for a moment, the picked ones first; returns the list with what is known then.

    The page asks again until it knows everything, so that its rows fill one by one, and no longer
    than it is open.
    """
    listed, end = host.checkpoints(), time.monotonic() + _MOMENT
    chosen = [name for name in parse_picks(picked) if name in listed]
    for name in dict.fromkeys([*chosen, *listed]):
        status = _status(listed[name])
        if status is not None:
            catalogue.inspect(listed[name], status)
        if time.monotonic() > end:
            break
    for name in chosen:
        status = _status(listed[name])
        if time.monotonic() > end:
            break
        if status is not None and not catalogue.knows_vae(listed[name], status):
            catalogue.inspect_vae(listed[name], status)
    return _to_json(host, catalogue, listed)


def _to_json(host: Host, catalogue: Catalogue, listed: Mapping[str, Path]) -> str:
    """Returns the list for the page's script: one object per file, with its facts where known."""
    kinds: dict[str, int] = {}
    rows = []
    for name, path in listed.items():
        status = _status(path)
        row: dict[str, Any] = {"name": name, "hash": host.known_hash(name) or ""}
        if status is None:
            rows.append(row | {"known": True, "problem": "file not found; press Refresh"})
            continue
        row |= {"size": status.st_size, "time": status.st_mtime}
        file = catalogue.known(path, status)
        if file is not None:
            row |= {
                "known": True,
                "family": file.family or "",
                "dtype": file.dtype,
                "problem": file.problem or "",
                "kind": kinds.setdefault(file.kind, len(kinds)),
                "made": file.is_hyper_model,
            }
            if file.problem or catalogue.knows_vae(path, status):
                row["vae"] = (file.vae or "none")[:12]
        rows.append(row)
    return json.dumps(rows)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (OSError, ValueError):
        return None


def offers_demo(host: Host) -> bool:
    """Returns whether to offer demo checkpoints: in the app, while its folder has none."""
    return not host.has_txt2img and not host.checkpoints()


def show_plan(host: Host, catalogue: Catalogue, groups: str, *values: Any) -> tuple[Any, ...]:
    """Describes the merge that the form asks for.

    Args:
        host: the program around the tab.
        catalogue: the facts about the files.
        groups: the groups that have buttons now, as JSON.
        values: the values of the form.

    Returns:
        The plan or why there can be none, the suggested name, the choice of a size, an update of the
        button for its curve, the dissimilar groups as JSON, updates of their buttons.
    """
    form = Form.from_widgets(*values)
    names = form.checkpoints
    suggested = suggest_name(names) if names else ""
    problem = _problem(host, catalogue, names)
    if problem is not None:
        buttons = update_group_buttons(names, None, groups)
        return (problem, gr.update(placeholder=suggested), *NO_CURVE, *buttons)
    plan, run, plot, forecast = _plan_and_forecast(host, form)
    buttons = update_group_buttons(names, forecast, groups)
    return (plan, gr.update(placeholder=run or suggested), *plot, *buttons)


def _problem(host: Host, catalogue: Catalogue, names: Sequence[str]) -> str | None:
    """Returns why there is no plan; None if there can be one."""
    if len(names) < 2:
        return format_message("info", "Pick one more checkpoint.") if names else ""
    listed = host.checkpoints()
    if not all(name in listed and _can_merge(catalogue, listed[name]) for name in names):
        return format_message(
            "bad", "Some of these checkpoints cannot be merged; the table says why."
        )
    return None


def _can_merge(catalogue: Catalogue, path: Path) -> bool:
    status = _status(path)
    return status is not None and not catalogue.inspect(path, status).problem


def _plan_and_forecast(
    host: Host, form: Form
) -> tuple[str, str, tuple[Any, Any], ForecastCurve | None]:
    """Returns the plan or why there is none, the run's name, updates of plot and button, and the forecast.

    The name is empty where there is no plan.
    """
    if not (form.ranks or "").strip():
        message = format_message("info", "Enter ranks, a total size or a share.")
        return message, "", *_without_size(host, form)
    try:
        preflight = preflight_form(host, form)
    except HyperMergeError as error:
        return format_message("bad", str(error)), "", *_without_size(host, form)
    forecast = known_forecast(preflight)
    size = forecast.requested_size(preflight) if forecast else None
    plan, run = _plan(form, preflight, size)
    if forecast is None:
        return plan, run, offer_curve(form.ranks, preflight), None
    plan += format_forecast_notes(forecast, preflight.recipe, size)
    return plan, run, show_curve(form.ranks, forecast, size, preflight.recipe), forecast


def _without_size(host: Host, form: Form) -> tuple[tuple[Any, Any], ForecastCurve | None]:
    """Returns the curve without a mark, so that it stays while ranks are being typed."""
    try:
        forecast = known_forecast(preflight_form(host, replace(form, ranks="1")))
    except HyperMergeError:
        return NO_CURVE, None
    if forecast is None:
        return NO_CURVE, None
    return show_curve(form.ranks, forecast, None, None), forecast


def _plan(form: Form, preflight: Preflight, size: int | None) -> tuple[str, str]:
    """Returns the plan, or why there is none, and the name that the run will have, or has."""
    try:
        preflight, place = with_free_name(preflight, named=has_name(form))
        return format_merge_plan(preflight, place, size), place.run
    except SameMergeError as error:
        text = (
            f"Made already: this is the run {error.run}. Change settings or name for another one."
        )
        return format_message("good", text), error.run
    except HyperMergeError as error:  # a checkpoint may have been removed just now
        return format_message("bad", str(error)), ""
