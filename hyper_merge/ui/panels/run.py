"""Builds the panel that starts a merge and shows its progress."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from hyper_merge.ui.element_ids import elem_id
from hyper_merge.ui.panels.widgets import button, hidden_text, html, widget


@dataclass(frozen=True)
class RunPanel:
    """The widgets that start a merge and show its progress."""

    plan: gr.HTML
    replan: gr.Button  # hidden by the style sheet: the scripts press it when the form has changed
    merge: gr.Button
    stop: gr.Button
    message: gr.HTML
    status: gr.HTML
    ended: gr.Textbox  # hidden: the task whose end this page has seen last


def build_run() -> RunPanel:
    """Builds plan, buttons and progress."""
    gr.HTML("<h3>3. Merge</h3>")
    plan = html("plan")
    replan = button("replan", "Update the plan")
    with gr.Row(elem_id=elem_id("run_row")):
        merge = widget(gr.Button, "merge", value="Merge", variant="primary", scale=3)
        stop = widget(gr.Button, "stop", value="Stop", interactive=False, scale=1, min_width=90)
    message, status = html("message"), html("status")
    button("notify", "Notify me when it is done")  # shown where it can be allowed, by the scripts
    return RunPanel(plan, replan, merge, stop, message, status, hidden_text("ended"))
