"""The tab as a whole: panels put together, and every event in one place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr
import torch

from hyper_merge.hosts.host import Host
from hyper_merge.ui import history, merging, picking, results
from hyper_merge.ui.compat import browser, quiet
from hyper_merge.ui.element_ids import elem_id
from hyper_merge.ui.form import PRESETS
from hyper_merge.ui.jobs import Jobs, process_jobs
from hyper_merge.ui.panels import (
    FormWidgets,
    HistoryPanel,
    PickerPanel,
    ResultPanel,
    RunPanel,
    build_form,
    build_history,
    build_picker,
    build_result,
    build_run,
    in_order,
)

_COPY = "(text) => { hyperMerge.copy(text); return []; }"
_SELECT = "(title) => { hyperMerge.select(title); return []; }"
_REPLAN = "() => { hyperMerge.replan(); return []; }"
_PLANNED = "() => { hyperMerge.planned(); return []; }"
_PROMPT = "(name, prompts) => JSON.parse(prompts || '{}')[name] || ''"
_REFRESH_STYLES = "() => { hyperMerge.refresh('styles'); return []; }"
_REFRESH_ALL = "(run) => { hyperMerge.refresh('all', run); return []; }"


@dataclass(frozen=True)
class _Tab:
    picker: PickerPanel
    form: FormWidgets
    presets: list[gr.Button]
    run: RunPanel
    result: ResultPanel
    history: HistoryPanel


def build_tab(host: Host, jobs: Jobs | None = None, **settings: Any) -> gr.Blocks:
    """The tab's page.

    Args:
        host: the WebUI, or the folder of the app.
        jobs: those to show and start; by default the process's.
        settings: of the `gr.Blocks`, for a page of its own.
    """
    jobs = jobs or process_jobs()
    with gr.Blocks(analytics_enabled=False, **settings) as page:
        with gr.Column(elem_id=elem_id("tab")):
            tab = _build(host)
        _wire_picker(tab, host)
        _wire_run(tab, host, jobs)
        _wire_result(tab, host)
        _wire_history(tab, host, jobs)
        _wire_page(page, tab, host, jobs)
    return page


def devices() -> list[str]:
    """What can be computed on here."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["auto", "cpu", *(f"cuda:{number}" for number in range(count))]


def _build(host: Host) -> _Tab:
    names = list(host.checkpoints())
    with gr.Tabs(elem_id=elem_id("tabs")):
        with gr.Tab("Merge", elem_id=elem_id("merge_tab")), gr.Row(elem_id=elem_id("columns")):
            with gr.Column(scale=5, min_width=380):
                picker = build_picker(
                    names, picking.folders_in(names), demo=picking.offers_demo(host)
                )
                form, presets = build_form(host, picker.checkpoints, devices())
                run = build_run()
            with gr.Column(scale=6, min_width=420):
                result = build_result(host)
        with gr.Tab("Runs", elem_id=elem_id("runs_tab")):
            earlier = build_history()
    return _Tab(picker, form, presets, run, result, earlier)


def _wire_picker(tab: _Tab, host: Host) -> None:
    picker, form = tab.picker, tab.form
    _on(picker.refresh.click, host.refresh, [], []).then(
        **_listing(tab, host), **quiet(queued=False)
    ).then(None, None, None, **browser(_REPLAN))
    _on(
        picker.add.click,
        functools.partial(picking.add_folder, host),
        [form.checkpoints, picker.folder],
        [form.checkpoints],
    )
    _on(picker.clear.click, picking.none_picked, [], [form.checkpoints])
    for button, word in zip(tab.presets, PRESETS, strict=True):
        _on(button.click, functools.partial(picking.preset, word), [], [form.ranks])
    settings = [widget for widget in in_order(form) if widget is not form.save_styles]
    # One event for all of them, so that no late answer to an earlier change comes last.
    for widget in settings:
        widget.change(None, None, None, **browser(_REPLAN))
    tab.run.replan.click(**_plan(tab, host), **quiet(queued=False)).then(
        None, None, None, **browser(_PLANNED)
    )


def _wire_run(tab: _Tab, host: Host, jobs: Jobs) -> None:
    run, picker, form = tab.run, tab.picker, tab.form
    started = _on(
        run.merge.click, functools.partial(merging.start, host, jobs), in_order(form), [run.message]
    )
    merged = started.then(**_watch(tab, jobs))
    _show_outcome(merged, tab, host, jobs).then(None, None, None, **browser(_REPLAN))
    _on(run.stop.click, functools.partial(merging.stop, jobs), [], [run.message])
    begun = _on(
        picker.demo.click, functools.partial(merging.start_demo, host, jobs), [], [run.message]
    )
    begun.then(**_watch(tab, jobs)).then(**_listing(tab, host), **quiet(queued=False)).then(
        functools.partial(merging.after_demo, host, jobs),
        [],
        [form.checkpoints, form.ranks],
        **quiet(queued=False),
    )


def _wire_result(tab: _Tab, host: Host) -> None:
    result = tab.result
    result.checkpoint.change(
        None, [result.checkpoint, result.prompts], [result.prompt], **browser(_PROMPT)
    )
    result.copy.click(None, [result.prompt], None, **browser(_COPY))
    result.send.click(None, [result.title], None, **browser(_SELECT))
    _on(result.send.click, results.sent, [result.run, result.title], [result.note])
    host.connect_send(result.send, result.prompt)
    for button, handler in (
        (result.save_styles, results.save_styles),
        (result.remove_styles, results.remove_styles),
    ):
        _on(button.click, functools.partial(handler, host), [result.run], [result.note]).then(
            None, None, None, **browser(_REFRESH_STYLES)
        )


def _wire_history(tab: _Tab, host: Host, jobs: Jobs) -> None:
    panel = tab.history
    asking = [panel.outcome, panel.confirm, panel.cancel]
    _on(panel.refresh.click, **_runs(tab, host))
    _on(
        panel.open.click,
        functools.partial(results.show, host),
        [panel.run],
        _result_outputs(tab),
    ).then(None, None, None, **browser("() => { hyperMerge.openTab(0); return []; }"))
    _on(
        panel.copy.click,
        functools.partial(history.copy_settings, host),
        [panel.run],
        [*in_order(tab.form), panel.outcome],
    )
    _on(
        panel.compare.click,
        functools.partial(history.compare, host),
        [panel.run, panel.other],
        [panel.outcome],
    )
    _on(panel.delete.click, functools.partial(history.ask_to_delete, host), [panel.run], asking)
    _on(panel.confirm.click, functools.partial(history.delete, host), [panel.run], asking).then(
        **_runs(tab, host), **quiet(queued=False)
    )
    _on(panel.cancel.click, history.keep, [], asking)
    _on(panel.clear.click, functools.partial(history.clear, host, jobs), [], [panel.outcome]).then(
        **_runs(tab, host), **quiet(queued=False)
    )


def _wire_page(page: gr.Blocks, tab: _Tab, host: Host, jobs: Jobs) -> None:
    """What a page asks for when it opens: the lists as they are now, and the job that runs."""
    _on(page.load, **_listing(tab, host)).then(**_plan(tab, host), **quiet(queued=False))
    _on(page.load, **_runs(tab, host))
    _show_outcome(page.load(**_watch(tab, jobs)), tab, host, jobs)


def _show_outcome(event: Any, tab: _Tab, host: Host, jobs: Jobs) -> Any:
    shown = event.then(
        functools.partial(merging.after, host, jobs),
        [],
        _result_outputs(tab),
        **quiet(queued=False),
    )
    shown.then(None, [tab.result.run], None, **browser(_REFRESH_ALL))
    return shown.then(**_runs(tab, host), **quiet(queued=False))


def _watch(tab: _Tab, jobs: Jobs) -> dict[str, Any]:
    return {
        "fn": functools.partial(merging.watch, jobs),
        "inputs": [],
        "outputs": [tab.run.status, tab.run.stop],
        **quiet(queued=True),
    }


def _listing(tab: _Tab, host: Host) -> dict[str, Any]:
    return {
        "fn": functools.partial(picking.listing, host),
        "inputs": [tab.form.checkpoints],
        "outputs": [tab.form.checkpoints, tab.picker.folder, tab.form.base, tab.picker.demo],
    }


def _plan(tab: _Tab, host: Host) -> dict[str, Any]:
    return {
        "fn": functools.partial(picking.plan, host),
        "inputs": in_order(tab.form),
        "outputs": [tab.picker.table, tab.run.plan],
    }


def _runs(tab: _Tab, host: Host) -> dict[str, Any]:
    panel = tab.history
    return {
        "fn": functools.partial(history.runs, host),
        "inputs": [panel.run, panel.other],
        "outputs": [panel.table, panel.run, panel.other, panel.cache],
    }


def _result_outputs(tab: _Tab) -> list[Any]:
    result = tab.result
    return [
        result.empty,
        result.group,
        result.sentence,
        result.table,
        result.checkpoint,
        result.prompt,
        result.note,
        result.explained,
        result.similarity,
        result.parts,
        result.run,
        result.title,
        result.prompts,
    ]


def _on(
    event: Callable[..., Any], fn: Callable[..., Any], inputs: list[Any], outputs: list[Any]
) -> Any:
    """Wires an event whose answer is quick."""
    return event(fn, inputs, outputs, **quiet(queued=False))
