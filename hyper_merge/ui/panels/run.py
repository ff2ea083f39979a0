"""Builds the panel that starts a merge and shows its progress."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from hyper_merge.ui.element_ids import elem_id
from hyper_merge.ui.panels.widgets import button, html, widget


@dataclass(frozen=True)
class RunPanel:
    """The widgets that start a merge and show its progress."""

    plan: gr.HTML
    replan: gr.Button  # hidden by the style sheet: the scripts press it when the form has changed
    curve: gr.Plot
    forecast: gr.Button
    merge: gr.Button
    stop: gr.Button
    message: gr.HTML
    status: gr.HTML


def build_run() -> RunPanel:
    """Builds plan, forecast, buttons and progress."""
    gr.HTML("<h3>3. Merge</h3>")
    plan = html("plan")
    replan = button("replan", "Update the plan")
    curve = widget(gr.Plot, "outlook_plot", show_label=False, visible=False)
    forecast = button("look", "Show forecast", visible=False)
    with gr.Row(elem_id=elem_id("run_row")):
        merge = widget(gr.Button, "merge", value="Merge", variant="primary", scale=3)
        stop = widget(gr.Button, "stop", value="Stop", interactive=False, scale=1, min_width=90)
    return RunPanel(plan, replan, curve, forecast, merge, stop, html("message"), html("status"))
