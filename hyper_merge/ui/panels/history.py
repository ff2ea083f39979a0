"""Earlier runs, and the cache."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from hyper_merge.ui.element_ids import elem_id
from hyper_merge.ui.panels.widgets import button, html, widget


@dataclass(frozen=True)
class HistoryPanel:
    """Earlier runs."""

    table: gr.HTML
    run: gr.Dropdown
    other: gr.Dropdown
    open: gr.Button
    copy: gr.Button
    compare: gr.Button
    delete: gr.Button
    asked: gr.Textbox  # hidden: the run whose files are listed
    confirm: gr.Button
    cancel: gr.Button
    refresh: gr.Button
    outcome: gr.HTML
    cache: gr.HTML
    clear: gr.Button


def build_history() -> HistoryPanel:
    """Runs that were made before, and the cache."""
    table = html("runs_table")
    with gr.Row():
        run = widget(gr.Dropdown, "run", choices=[], label="Run")
        other = widget(gr.Dropdown, "other_run", choices=[], label="Compare with")
    with gr.Row(elem_id=elem_id("runs_row")):
        opened = button("run_open", "Open")
        copied = button("run_copy", "Copy its settings to the form")
        compare = button("run_compare", "Compare")
        delete = button("run_delete", "Delete …")
        refresh = button("runs_refresh", "Refresh")
    outcome = html("run_outcome")
    asked = widget(gr.Textbox, "run_asked", value="", visible=False)
    with gr.Row():
        confirm = widget(
            gr.Button, "run_confirm", value="Delete these files", variant="stop", visible=False
        )
        cancel = button("run_cancel", "Keep them", visible=False)
    with gr.Row(elem_id=elem_id("cache_row")):
        cache = html("cache")
        clear = button("cache_clear", "Clear the cache")
    return HistoryPanel(
        table, run, other, opened, copied, compare, delete, asked, confirm, cancel, refresh,
        outcome, cache, clear,
    )  # fmt: skip
