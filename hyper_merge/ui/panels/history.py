"""Builds the panel of earlier runs and of the cache."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from hyper_merge.ui.element_ids import elem_id
from hyper_merge.ui.panels.widgets import button, hidden_text, html, widget


@dataclass(frozen=True)
class HistoryPanel:
    """The widgets of earlier runs and of the cache, in a tab that reads them when it is opened."""

    opened: gr.Tab
    table: gr.HTML
    run: (
        gr.Textbox
    )  # hidden by the style sheet: the run whose row is picked, which the scripts write
    other: gr.Dropdown
    open: gr.Button
    copy: gr.Button
    beside: gr.Button
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
    with gr.Row(elem_id=elem_id("search_row")):
        # answered by the scripts
        widget(
            gr.Textbox,
            "runs_search",
            value="",
            label="Search",
            info="Any words of name, checkpoints, LoRAs, family, ranks or date.",
            max_lines=1,
            scale=4,
        )
        run = widget(gr.Textbox, "run", value="", label="Run")
        refresh = button("runs_refresh", "Refresh")
    table = html("runs_table")
    with gr.Row(elem_id=elem_id("runs_row")):
        opened = button("run_open", "Open")
        copied = button("run_copy", "Copy its settings")
        delete = button("run_delete", "Delete…")
        beside = button("run_beside", "Show side by side with")
        other = widget(
            gr.Dropdown,
            "other_run",
            choices=[],
            label="Another run",
            show_label=False,
            container=False,
            min_width=160,
        )
    outcome = html("run_outcome")
    to_delete = hidden_text("run_asked")
    with gr.Row():
        confirm = widget(
            gr.Button, "run_confirm", value="Delete these files", variant="stop", visible=False
        )
        cancel = button("run_cancel", "Cancel", visible=False)
    with gr.Row(elem_id=elem_id("cache_row")):
        cache = html("cache")
        clear = button("cache_clear", "Clear cache")
    return HistoryPanel(
        tab, table, run, other, opened, copied, beside, delete, to_delete, confirm, cancel, refresh,
        outcome, cache, clear,
    )  # fmt: skip
