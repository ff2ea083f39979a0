"""Builds the panel in which checkpoints are picked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from hyper_merge.ui.element_ids import elem_id
from hyper_merge.ui.form_fields import form_field
from hyper_merge.ui.html.picker import format_picker
from hyper_merge.ui.panels.widgets import button, hidden_text, html, widget


@dataclass(frozen=True)
class GroupWidgets:
    """Dissimilar groups of the picked checkpoints, in the order of `update_group_buttons`."""

    names: gr.Textbox  # hidden: the groups' checkpoints, as JSON
    first: gr.Button
    second: gr.Button
    third: gr.Button
    fourth: gr.Button


@dataclass(frozen=True)
class PickerPanel:
    """The widgets in which checkpoints are picked; the script draws into `frame`."""

    checkpoints: (
        gr.Textbox
    )  # hidden by the style sheet: the picked names, as JSON, for the script too
    catalogue: gr.Textbox  # hidden: the host's list and what is known of each file, as JSON
    frame: gr.HTML
    inspect: gr.Button  # hidden by the style sheet: the script presses it while it lacks facts
    add: gr.Button
    clear: gr.Button
    refresh: gr.Button
    demo: gr.Button
    groups: GroupWidgets


def build_picker(folder: Path, *, demo: bool) -> PickerPanel:
    """Builds the list to pick from and the table of the picked checkpoints.

    Args:
        folder: of the checkpoints.
        demo: whether to offer to make some.
    """
    gr.HTML("<h3>1. Checkpoints</h3>")
    checkpoints = widget(
        gr.Textbox, "checkpoints", value="[]", label=form_field("checkpoints").label
    )
    catalogue = hidden_text("catalogue")
    frame = html("picker", format_picker(folder))
    inspect = button("inspect", "Inspect more files")
    with gr.Row(elem_id=elem_id("picker_row")):
        add = button("add_folder", "Add all")
        clear = button("clear", "Clear")
        refresh = button("refresh", "Refresh")
        demo_button = button("demo", "Create four small demo checkpoints", visible=demo)
    return PickerPanel(
        checkpoints, catalogue, frame, inspect, add, clear, refresh, demo_button, _groups()
    )


def _groups() -> GroupWidgets:
    names = hidden_text("groups")
    with gr.Row(elem_id=elem_id("groups_row")):
        buttons = [
            button(f"group_{number}", f"Pick group {number}", visible=False)
            for number in range(1, 5)
        ]
    return GroupWidgets(names, *buttons)
