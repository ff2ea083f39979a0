"""Wires the events of the tab "Merge" (picking, planning, merging), and of a page that opens."""

from __future__ import annotations

import functools

import gradio as gr

from hyper_merge.recipe.default_ranks import RANK_WORDS
from hyper_merge.ui.handlers.forecast import pick_group, start_forecast
from hyper_merge.ui.handlers.merge import (
    pick_demo_checkpoints,
    start_demo,
    start_merge,
    stop_job,
)
from hyper_merge.ui.handlers.picker import inspect_some
from hyper_merge.ui.panels.widgets import in_order
from hyper_merge.ui.wiring.common import CLEARED, LISTED, REPLAN, Wiring
from hyper_merge.ui.wiring.events import in_browser
from hyper_merge.ui.wiring.presets import wire_opened_form

_CHANGED = "() => { hyperMerge.replan(); return ''; }"  # clears the message about the form before
_PICKED = "() => { hyperMergePicker.pick(); return []; }"
_ADD_ALL = "() => { hyperMergePicker.addAll(); return []; }"
_CLEAR = "() => { hyperMergePicker.clear(); return []; }"
_BEGUN = "(refusal) => { hyperMerge.begun(!refusal); return []; }"
_REVEAL = "() => { hyperMerge.reveal(); return []; }"
_PLANNED = "() => { hyperMerge.planned(); return []; }"


def wire_picker(wires: Wiring) -> None:
    """Wires the list, the form, and the plan after each of their changes."""
    picker, form, host = wires.picker, wires.form, wires.host
    refreshed = wires.on(picker.refresh.click, host.refresh, [], [])
    in_browser(wires.list_checkpoints(refreshed.then).then, REPLAN)
    inspect = functools.partial(inspect_some, host, wires.catalogue)
    inspected = wires.on(picker.inspect.click, inspect, [form.checkpoints], [picker.catalogue])
    in_browser(inspected.then, LISTED, [picker.catalogue])
    in_browser(picker.add.click, _ADD_ALL)
    in_browser(picker.clear.click, _CLEAR)
    in_browser(form.checkpoints.change, _PICKED)
    for button, word in zip(wires.presets, RANK_WORDS, strict=True):
        in_browser(button.click, f"() => '{word}'", None, [form.ranks])
    for number, button in enumerate(in_order(picker.groups)[1:]):
        pick = functools.partial(pick_group, number)
        wires.on(button.click, pick, [picker.groups.names], [form.checkpoints])
    # One event for all of them, so that no late answer to an earlier change comes last.
    for widget in in_order(form):
        if widget is not form.save_styles:
            in_browser(widget.change, _CHANGED, None, [wires.run.message])
    in_browser(wires.plan(wires.run.replan.click).then, _PLANNED)


def wire_run(wires: Wiring) -> None:
    """Wires Merge, the forecast, Stop, and the demo's checkpoints."""
    run, form, host, jobs = wires.run, wires.form, wires.host, wires.jobs
    start = functools.partial(start_merge, host, jobs)
    started = wires.on(run.merge.click, start, in_order(form), [run.message])
    in_browser(started.then, _BEGUN, [run.message])
    wires.watch(started.then, run.message)
    in_browser(wires.show_outcome().then, _REVEAL)
    in_browser(run.merge.click, CLEARED, None, [wires.size.note])
    forecast = functools.partial(start_forecast, host, jobs)
    begun = wires.on(wires.size.forecast.click, forecast, in_order(form), [run.message])
    wires.watch(begun.then, run.message)
    wires.on(run.stop.click, functools.partial(stop_job, jobs), [], [run.message])
    make = functools.partial(start_demo, host, jobs)
    begun = wires.on(wires.picker.demo.click, make, [], [run.message])
    listed = wires.list_checkpoints(wires.watch(begun.then, run.message).then)
    wires.on(
        listed.then,
        functools.partial(pick_demo_checkpoints, host, jobs),
        [run.message],
        [form.checkpoints, form.ranks],
    )


def wire_page(page: gr.Blocks, wires: Wiring) -> None:
    """Wires the loading of lists, form, progress and result when a page opens."""
    listed = wires.list_checkpoints(page.load)
    wires.plan(wire_opened_form(wires, listed.then).then)
    wires.list_runs(page.load)
    wires.watch(page.load)
