"""Builds the panel of presets: named settings of the form, with its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from hyper_merge.ui.element_ids import elem_id
from hyper_merge.ui.panels.widgets import button, hidden_text, html, widget


@dataclass(frozen=True)
class PresetsPanel:
    """The widgets that save, load and delete presets."""

    preset: gr.Dropdown
    load: gr.Button
    delete: gr.Button
    name: gr.Textbox
    save: gr.Button
    note: gr.HTML
    kept: gr.Textbox  # hidden: what the browser remembers of the form, as JSON


def build_presets() -> PresetsPanel:
    """Builds the list of presets, a name for a new one, and their buttons."""
    with gr.Accordion("Presets", open=False, elem_id=elem_id("presets_panel")):
        with gr.Row(elem_id=elem_id("preset_row")):
            preset = widget(
                gr.Dropdown,
                "preset",
                choices=[],
                label="Preset",
                info="All settings and checkpoints under a name. Kept in the folder of the runs.",
                scale=3,
            )
            load = button("preset_load", "Load")
            delete = button("preset_delete", "Delete")
        with gr.Row(elem_id=elem_id("preset_name_row")):
            name = widget(
                gr.Textbox,
                "preset_name",
                label="Save as",
                info="A preset of this name is replaced.",
                max_lines=1,
                scale=3,
            )
            save = button("preset_save", "Save")
        note = html("preset_note")
    return PresetsPanel(preset, load, delete, name, save, note, hidden_text("kept"))
