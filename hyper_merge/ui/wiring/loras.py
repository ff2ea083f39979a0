"""Wires the events of the tab "LoRAs": its list, the choice of what to make, jobs, and earlier runs."""

from __future__ import annotations

import functools
import json
from typing import Any

import gradio as gr

from hyper_merge.operations.loras.inspect import process_lora_catalogue
from hyper_merge.ui.handlers.lora_jobs import start_lora_job
from hyper_merge.ui.handlers.loras import (
    CHOICES,
    change_choice,
    copy_lora_settings,
    inspect_some_loras,
    list_loras,
    show_lora_run,
    watch_lora_job,
)
from hyper_merge.ui.handlers.merge import stop_job
from hyper_merge.ui.panels.loras import LoraPanel
from hyper_merge.ui.panels.widgets import in_order
from hyper_merge.ui.wiring.common import REFRESH_FILES, Trigger, Wiring
from hyper_merge.ui.wiring.events import guarded_stream, in_browser, in_python

_LISTED = "(list) => { hyperMergeLoras.list(list); return []; }"
_PICKED = "() => { hyperMergeLoras.pick(); return []; }"
_ADD_ALL = "() => { hyperMergeLoras.addAll(); return []; }"
_CLEAR = "() => { hyperMergeLoras.clear(); return []; }"
_WEIGHED = [text for text, choice in CHOICES.items() if choice.weighs]
_CHOSEN = (
    f"(choice) => {{ hyperMergeLoras.weigh({json.dumps(_WEIGHED)}.includes(choice)); return []; }}"
)


def wire_loras(wires: Wiring) -> None:
    """Wires the list, and what each choice needs."""
    panel, host = wires.loras, wires.host
    form, message, known = panel.form, panel.message, process_lora_catalogue()
    refreshed = wires.on(panel.refresh.click, host.refresh, [], [], message)
    list_again(wires, refreshed.then)
    inspect = functools.partial(inspect_some_loras, host, known)
    inspected = wires.on(panel.inspect.click, inspect, [form.picked], [panel.catalogue], message)
    in_browser(inspected.then, _LISTED, [panel.catalogue])
    in_browser(panel.add.click, _ADD_ALL)
    in_browser(panel.clear.click, _CLEAR)
    in_browser(form.picked.change, _PICKED)
    wires.on(form.choice.input, change_choice, [form.choice, panel.chosen], _fields(panel), message)
    in_browser(form.choice.change, _CHOSEN, [form.choice])


def wire_lora_jobs(wires: Wiring) -> None:
    """Wires the button that starts a job, Stop, and pages that open while one runs."""
    panel, jobs = wires.loras, wires.jobs
    start = functools.partial(start_lora_job, wires.host, jobs)
    message = panel.message
    started = wires.on(panel.start.click, start, in_order(panel.form), [message], message)
    ended = _follow(wires, started.then, begun=True)
    in_browser(ended.then, REFRESH_FILES, [panel.wrote])
    wires.list_checkpoints(ended.then)
    list_again(wires, wires.list_runs(ended.then).then)
    # Not when the page opens: gradio logs an error for every page that is closed at once.
    _follow(wires, list_again(wires, panel.opened.select).then, begun=False)
    wires.on(panel.stop.click, functools.partial(stop_job, jobs), [], [message], message)


def wire_lora_runs(wires: Wiring) -> None:
    """Wires the buttons of the tab "Runs" for the runs that belong here."""
    panel, run = wires.loras, wires.history.run
    show = functools.partial(show_lora_run, wires.host)
    wires.on(wires.history.open.click, show, [run], [panel.result], panel.message)
    copy = functools.partial(copy_lora_settings, wires.host)
    outputs = [panel.form.picked, panel.form.choice, *_fields(panel), panel.message]
    wires.on(wires.history.copy.click, copy, [run], outputs, panel.message)


def _fields(panel: LoraPanel) -> list[Any]:
    """The widgets that depend on the choice, in the order of `change_choice`."""
    form = panel.form
    return [
        panel.chosen, panel.about, form.size, form.checkpoint, form.run, form.name, panel.advanced,
        form.block_weights, panel.start,
    ]  # fmt: skip


def list_again(wires: Wiring, trigger: Trigger) -> Any:
    """Reads the lists of LoRAs, checkpoints and runs of LoRAs again."""
    panel, form = wires.loras, wires.loras.form
    listed = wires.on(
        trigger,
        functools.partial(list_loras, wires.host, process_lora_catalogue()),
        [form.checkpoint, form.run],
        [panel.catalogue, form.checkpoint, form.run],
        panel.message,
    )
    in_browser(listed.then, _LISTED, [panel.catalogue])
    return listed


def _follow(wires: Wiring, trigger: Trigger, *, begun: bool) -> Any:
    panel = wires.loras
    answers = guarded_stream(
        functools.partial(watch_lora_job, wires.jobs, begun=begun),
        lambda text: (text, *(gr.update(),) * 4),
        wires.host.log,
    )
    outputs = [panel.status, panel.stop, panel.message, panel.result, panel.wrote]
    return in_python(trigger, answers, [], outputs, queued=True)
