"""The button, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from hyper_merge.ui.element_ids import elem_id
from hyper_merge.ui.panels.widgets import button, html, widget


@dataclass(frozen=True)
class RunPanel:
    """The button, and how far it is."""

    plan: gr.HTML
    replan: gr.Button  # hidden by the style sheet: the scripts press it when the form has changed
    curve: gr.Plot
    look: gr.Button
    merge: gr.Button
    stop: gr.Button
    message: gr.HTML
    status: gr.HTML


def build_run() -> RunPanel:
    """What it will take, the button, and progress."""
    gr.HTML("<h3>3. Merge</h3>")
    plan = html("plan")
    replan = button("replan", "Look again")
    curve = widget(gr.Plot, "outlook_plot", show_label=False, visible=False)
    look = button("look", "Look at the files first", visible=False)
    with gr.Row(elem_id=elem_id("run_row")):
        merge = widget(gr.Button, "merge", value="Merge", variant="primary", scale=3)
        stop = widget(gr.Button, "stop", value="Stop", interactive=False, scale=1, min_width=90)
    return RunPanel(plan, replan, curve, look, merge, stop, html("message"), html("status"))
