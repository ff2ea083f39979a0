"""Wires the events of the tab "Compare": drawing, progress, earlier comparisons."""

from __future__ import annotations

import functools
from typing import Any

import gradio as gr

from hyper_merge.ui.handlers.compare import (
    choose_compared_run,
    list_comparisons,
    show_comparison,
    start_comparison,
    watch_comparison,
)
from hyper_merge.ui.handlers.merge import stop_job
from hyper_merge.ui.panels.widgets import in_order
from hyper_merge.ui.wiring.common import CLEARED, Trigger, Wiring
from hyper_merge.ui.wiring.events import guarded_stream, in_browser, in_python


def wire_compare(page: gr.Blocks, wires: Wiring) -> None:
    """Wires Compare, Stop, the lists, and pages that open while a comparison is drawn."""
    panel, host, jobs = wires.compare, wires.host, wires.jobs
    form, message = panel.form, panel.message
    lists = [form.run, form.checkpoints, panel.earlier, panel.comparison]

    def refresh_lists(trigger: Trigger) -> Any:
        fn = functools.partial(list_comparisons, host)
        return wires.on(trigger, fn, [form.run, form.checkpoints, panel.earlier], lists, message)

    def follow(trigger: Trigger, inputs: list[Any], *, begun: bool) -> None:
        answers = guarded_stream(
            functools.partial(watch_comparison, jobs, host, begun=begun),
            lambda text: (text, gr.update(), gr.update(), gr.update()),
            host.log,
        )
        outputs = [panel.status, panel.stop, message, panel.earlier]
        in_python(trigger, answers, inputs, outputs, queued=True)

    refresh_lists(page.load)
    choose = functools.partial(choose_compared_run, host)
    wires.on(form.run.change, choose, [form.run], lists[1:], message)
    in_browser(form.run.input, CLEARED, None, [message])
    show = functools.partial(show_comparison, host)
    wires.on(panel.earlier.change, show, [form.run, panel.earlier], [panel.comparison], message)
    start = functools.partial(start_comparison, host, jobs)
    started = wires.on(panel.start.click, start, in_order(form), [message], message)
    follow(started.then, [form.run, message], begun=True)
    # Not when the page opens: gradio logs an error for every page that is closed at once.
    follow(refresh_lists(panel.opened.select).then, [form.run], begun=False)
    wires.on(panel.stop.click, functools.partial(stop_job, jobs), [], [message], message)
