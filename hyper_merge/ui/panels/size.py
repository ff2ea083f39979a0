"""Builds the choice of a size: three fields that agree, and the curve on which one can be picked."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from hyper_merge.recipe.default_ranks import RANK_WORDS
from hyper_merge.ui.element_ids import elem_id
from hyper_merge.ui.html.size import format_size_fields
from hyper_merge.ui.panels.widgets import button, html


@dataclass(frozen=True)
class SizePanel:
    """The fields and the curve. The form's own widget, `ranks`, holds what was filled in last."""

    forecast: gr.Button
    fields: gr.HTML
    note: gr.HTML  # about settings that were copied into the form
    choice: gr.HTML  # hidden by the style sheet: what the scripts draw and fill in


def build_size() -> tuple[SizePanel, list[gr.Button]]:
    """Builds the panel, and the buttons that fill in a word for the ranks."""
    note = html("form_note")
    forecast = button("look", "See what each size would explain", visible=False)
    fields, choice = html("size", format_size_fields()), html("size_choice")
    with gr.Row(elem_id=elem_id("presets")):
        presets = [button(f"preset_{word}", word.capitalize()) for word in RANK_WORDS]
    return SizePanel(forecast, fields, note, choice), presets
