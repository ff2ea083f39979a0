"""Handles the forecast before a merge: explained share by the LoRAs' size, and dissimilar groups.

Handlers take and return plain values or `gr.update(...)`, no widgets. The first arguments come from the
wiring (the host, the process's jobs), the rest from the browser. A refusal becomes a message, never an
error.
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
from hyper_merge.operations.merge.plan import (
    ForecastCurve,
    forecast_seconds,
    size_without_forecast,
)
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.ui.form import Form
from hyper_merge.ui.handlers.merge_request import preflight_form
from hyper_merge.ui.html.common import format_refusal
from hyper_merge.ui.html.size import format_forecast_offer, format_size_choice

GROUPS: Final = 4  # with a button each

NO_CURVE: Final = ("", gr.update(visible=False))
"""Values of the choice of a size, and of the button that gives it a curve."""


def start_forecast(host: Host, jobs: Jobs, *values: Any) -> str:
    """Starts the forecast, which writes nothing but the cache; returns why not, or "" if it started."""
    form = Form.from_widgets(*values)
    try:
        preflight_form(host, form)
        work = functools.partial(forecast_task, host, functools.partial(preflight_form, host, form))
        jobs.start(FORECAST_TITLE, work, host.log, form=form)
    except HyperMergeError as error:
        return format_refusal(error)
    return ""


def pick_group(number: int, groups: str) -> str:
    """Returns the checkpoints of a group as JSON, 0 for the first one; none if there is no such group."""
    members = json.loads(groups or "[]")
    return json.dumps(members[number] if number < len(members) else [])


def show_curve(
    text: str, forecast: ForecastCurve, size: int | None, recipe: Recipe | None
) -> tuple[Any, Any]:
    """Shows the curve on which a size can be picked, and hides the button that makes it.

    Args:
        text: the form's ranks, size or share.
        forecast: the curve.
        size: bytes of the LoRAs that the form describes; None for no mark.
        recipe: what the form describes; None where that is nothing yet.
    """
    return format_size_choice(text, forecast, size, _asked_ranks(recipe)), gr.update(visible=False)


def offer_curve(text: str, preflight: Preflight) -> tuple[Any, Any]:
    """Shows the size alone, and the button that makes the curve."""
    size, asked = size_without_forecast(preflight), _asked_ranks(preflight.recipe)
    choice = format_size_choice(text, None, size, asked)
    offer = format_forecast_offer(forecast_seconds(preflight))
    return choice, gr.update(value=offer, visible=True)


def _asked_ranks(recipe: Recipe | None) -> tuple[int, ...] | None:
    return None if recipe is None or recipe.finds_ranks else recipe.ranks


def update_group_buttons(
    picked: Sequence[str], forecast: ForecastCurve | None, before: str
) -> tuple[Any, ...]:
    """Shows a button for each of the first dissimilar groups.

    They stay while exactly one of them is picked, so that the next can be picked after it.

    Args:
        picked: the picked checkpoints.
        forecast: their forecast, if it is known.
        before: the groups that have buttons now, as JSON.

    Returns:
        The groups as JSON, and an update for each button.
    """
    groups: list[list[str]] = []
    if forecast is not None and forecast.groups.are_apart:
        groups = [[picked[place] for place in group] for group in forecast.groups.groups]
    elif sorted(picked) in [sorted(group) for group in json.loads(before or "[]")]:
        groups = json.loads(before)
    buttons = (gr.update(visible=number < len(groups)) for number in range(GROUPS))
    return (json.dumps(groups), *buttons)
