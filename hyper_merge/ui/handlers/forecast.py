"""What could be had for how many bytes, before anything is written: its curve, and unlike groups.

Handlers: plain values in, plain values or `gr.update(...)` out, no widgets. The first arguments come
from the wiring (the host, the process's jobs), the rest from the browser. What is refused becomes a
message; it never leaves as an error.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any, Final

import gradio as gr

from hyper_merge.errors import HyperMergeError
from hyper_merge.hosts.host import Host
from hyper_merge.hosts.job_queue import Jobs
from hyper_merge.hosts.tasks import FORECAST_TITLE, forecast_task
from hyper_merge.operations.merge.plan import ForecastCurve
from hyper_merge.ui.form import Form
from hyper_merge.ui.handlers.merge_request import preflight_form
from hyper_merge.ui.html.common import format_refusal
from hyper_merge.ui.plots.forecast import forecast_plot

GROUPS: Final = 4  # that can be picked with a button each

NO_CURVE: Final = (gr.update(visible=False), gr.update(visible=False))
"""Values of the plot and of the button that would fill it."""


def start_forecast(host: Host, jobs: Jobs, *values: Any) -> str:
    """Starts the look at the files, or says why not; writes nothing but the cache."""
    form = Form(*values)
    try:
        preflight_form(host, form)
        work = functools.partial(forecast_task, host, functools.partial(preflight_form, host, form))
        jobs.start(FORECAST_TITLE, work, host.log)
    except HyperMergeError as error:
        return format_refusal(error)
    return ""


def pick_group(number: int, groups: str) -> list[str]:
    """The checkpoints of a group: 0 for the first one; none where it has gone."""
    known = json.loads(groups or "[]")
    return list(known[number]) if number < len(known) else []


def update_curve(found: ForecastCurve | None, asked: int | None) -> tuple[Any, Any]:
    """The plot, or else the button that would fill it."""
    if found is None:
        return gr.update(visible=False), gr.update(visible=True)
    return gr.update(value=forecast_plot(found, asked), visible=True), gr.update(visible=False)


def update_group_buttons(
    picked: Sequence[str], found: ForecastCurve | None, before: str
) -> tuple[Any, ...]:
    """The unlike groups as JSON, and a button for each of the first ones.

    They stay while one of them is what is picked, so that the next can be picked after it.
    """
    groups: list[list[str]] = []
    if found is not None and found.groups.are_apart:
        groups = [[picked[place] for place in group] for group in found.groups.groups]
    elif sorted(picked) in [sorted(group) for group in json.loads(before or "[]")]:
        groups = json.loads(before)
    shown = (gr.update(visible=number < len(groups)) for number in range(GROUPS))
    return (json.dumps(groups), *shown)
