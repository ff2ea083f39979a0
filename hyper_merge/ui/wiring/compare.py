"""Events of the pictures: what is drawn, how far it is, and what was drawn before."""

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
from hyper_merge.ui.wiring.common import Trigger, Wiring
from hyper_merge.ui.wiring.events import guarded_stream, in_python


def wire_compare(page: gr.Blocks, wires: Wiring) -> None:
    """Compare, Stop, the run that is chosen, and earlier comparisons; pages that open meanwhile."""
    panel, host, jobs = wires.compare, wires.host, wires.jobs
    form, said = panel.form, panel.message
    lists = [form.run, form.checkpoints, panel.earlier, panel.shown]

    def listed(trigger: Trigger) -> Any:
        fn = functools.partial(list_comparisons, host)
        return wires.on(trigger, fn, [form.run, form.checkpoints, panel.earlier], lists, said)

    def followed(trigger: Trigger, *, begun: bool) -> None:
        answers = guarded_stream(
            functools.partial(watch_comparison, jobs, host, begun=begun),
            lambda text: (text, gr.update(), gr.update(), gr.update()),
            host.log,
        )
        outputs = [panel.status, panel.stop, said, panel.earlier]
        in_python(trigger, answers, [form.run], outputs, queued=True)

    listed(page.load)
    chosen = functools.partial(choose_compared_run, host)
    wires.on(form.run.change, chosen, [form.run], lists[1:], said)
    show = functools.partial(show_comparison, host)
    wires.on(panel.earlier.change, show, [form.run, panel.earlier], [panel.shown], said)
    start = functools.partial(start_comparison, host, jobs)
    started = wires.on(panel.start.click, start, in_order(form), [said], said)
    followed(started.then, begun=True)
    # Not when the page opens: whoever leaves it at once would end up in the server's log.
    followed(listed(panel.opened.select).then, begun=False)
    wires.on(panel.stop.click, functools.partial(stop_job, jobs), [], [said], said)
