"""What could be had for how many bytes, before anything is written: its curve, and unlike groups.

Handlers: plain values in, plain values or `gr.update(...)` out, no widgets. The first arguments come
from the wiring (the host, the process's jobs), the rest from the browser. What is refused becomes a
message; it never leaves as an error.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import gradio as gr

from hyper_merge.control import Control
from hyper_merge.errors import HyperMergeError
from hyper_merge.hosts.host import Host
from hyper_merge.plan import LOOK_COSTS, Outlook, analysed, known_analysis, outlook
from hyper_merge.preflight import Preflight
from hyper_merge.ui import views, working
from hyper_merge.ui.form import Form
from hyper_merge.ui.jobs import Jobs
from hyper_merge.ui.outlook_plot import outlook_plot
from hyper_merge.ui.preparing import examined

LOOK: Final = "the look at the files"
"""Its job's title."""

GROUPS: Final = 4  # that can be picked with a button each

NO_CURVE: Final = (gr.update(visible=False), gr.update(visible=False))
"""Values of the plot and of the button that would fill it."""


def start_look(host: Host, jobs: Jobs, *values: Any) -> str:
    """Starts the look at the files, or says why not; writes nothing but the cache."""
    form = Form(*values)
    try:
        examined(host, form)
        work = functools.partial(look, host, functools.partial(examined, host, form))
        jobs.start(LOOK, work, host.log)
    except HyperMergeError as error:
        return views.refused(error)
    return ""


def pick_group(number: int, groups: str) -> list[str]:
    """The checkpoints of a group: 0 for the first one; none where it has gone."""
    known = json.loads(groups or "[]")
    return list(known[number]) if number < len(known) else []


def known_outlook(host: Host, preflight: Preflight) -> Outlook | None:
    """What could be had, if the files have been looked at before."""
    path = known_analysis(preflight, host.folders())
    try:
        return None if path is None else _outlook(_question(path, preflight, Control()))
    except (HyperMergeError, OSError):  # the cache was cleared just now
        return None


def curve(found: Outlook | None, asked: int | None) -> tuple[Any, Any]:
    """The plot, or else the button that would fill it."""
    if found is None:
        return gr.update(visible=False), gr.update(visible=True)
    return gr.update(value=outlook_plot(found, asked), visible=True), gr.update(visible=False)


def group_buttons(picked: Sequence[str], found: Outlook | None, before: str) -> tuple[Any, ...]:
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


@dataclass(frozen=True)
class _Question:
    """All that decides an outlook, and what answers it."""

    path: Path
    changed: int
    costs: tuple[int, ...]
    separate: bool
    layer_weights: str
    preflight: Preflight = field(compare=False)
    control: Control = field(compare=False)


def _question(path: Path, preflight: Preflight, control: Control) -> _Question:
    separate = preflight.recipe.multipliers == "separate"
    weights = preflight.recipe.layer_weights
    changed = path.stat().st_mtime_ns
    return _Question(path, changed, preflight.rank_bytes, separate, weights, preflight, control)


@functools.lru_cache(maxsize=8)
def _outlook(question: _Question) -> Outlook:
    """What could be had, which takes seconds and is not found again while the analysis is the same."""
    return outlook(question.path, question.preflight, question.control)


def look(host: Host, asked: Callable[[], Preflight], task: str, control: Control) -> str:
    """Looks at the files in a turn of the host's, so that `known_outlook` knows what could be had."""
    with working.turn(host, task, control) as both:
        preflight = asked()
        reading, looking = both.split(LOOK_COSTS)
        path = analysed(preflight, host.folders(), reading)
        _outlook(_question(path, preflight, looking))
    return ""
