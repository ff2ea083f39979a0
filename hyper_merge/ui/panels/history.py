"""Builds the panel of earlier runs and of the cache."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from hyper_merge.ui.element_ids import elem_id
from hyper_merge.ui.panels.widgets import button, html, widget


@dataclass(frozen=True)
class HistoryPanel:
    """The widgets of earlier runs and of the cache, in a tab that reads them when it is opened."""

    opened: gr.Tab
    table: gr.HTML
    run: gr.Dropdown
    other: gr.Dropdown
    open: gr.Button
    copy: gr.Button
    compare: gr.Button
    delete: gr.Button
    to_delete: gr.Textbox  # hidden: the run whose files are listed
    confirm: gr.Button
    cancel: gr.Button
    refresh: gr.Button
    outcome: gr.HTML
    cache: gr.HTML
    clear: gr.Button


def build_history(tab: gr.Tab) -> HistoryPanel:
    """Builds the list of earlier runs with its buttons, and the line about the cache, in a tab."""
    table = html("runs_table")
    with gr.Row():
        run = widget(gr.Dropdown, "run", choices=[], label="Run")
        other = widget(gr.Dropdown, "other_run", choices=[], label="Compare with")
    with gr.Row(elem_id=elem_id("runs_row")):
        opened = button("run_open", "Open")
        copied = button("run_copy", "Copy settings to the form")
        compare = button("run_compare", "Compare")
        delete = button("run_delete", "Delete…")
        refresh = button("runs_refresh", "Refresh")
    outcome = html("run_outcome")
    to_delete = widget(gr.Textbox, "run_asked", value="", visible=False)
    with gr.Row():
        confirm = widget(
            gr.Button, "run_confirm", value="Delete these files", variant="stop", visible=False
        )
        cancel = button("run_cancel", "Cancel", visible=False)
    with gr.Row(elem_id=elem_id("cache_row")):
        cache = html("cache")
        clear = button("cache_clear", "Clear cache")
    return HistoryPanel(
        tab, table, run, other, opened, copied, compare, delete, to_delete, confirm, cancel, refresh,
        outcome, cache, clear,
    )  # fmt: skip
