"""Builds the panel in which checkpoints are picked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import gradio as gr

from hyper_merge.ui.element_ids import elem_id
from hyper_merge.ui.form_fields import form_field
from hyper_merge.ui.panels.widgets import button, html, widget


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
    """The widgets in which checkpoints are picked."""

    checkpoints: gr.Dropdown
    folder: gr.Dropdown
    add: gr.Button
    refresh: gr.Button
    clear: gr.Button
    demo: gr.Button
    table: gr.HTML
    groups: GroupWidgets


def build_picker(names: Sequence[str], folders: Sequence[str], *, demo: bool) -> PickerPanel:
    """Builds the list of checkpoints, and the table that describes the picked ones."""
    field = form_field("checkpoints")
    gr.HTML("<h3>1. Checkpoints</h3>")
    checkpoints = widget(
        gr.Dropdown,
        "checkpoints",
        choices=list(names),
        value=[],
        multiselect=True,
        label=field.label,
        info=field.info,
    )
    with gr.Row(elem_id=elem_id("picker_row")):
        folder = widget(
            gr.Dropdown,
            "folder",
            choices=list(folders),
            value=folders[0],
            label="Folder",
            show_label=False,
            container=False,
            scale=3,
            min_width=160,
        )
        add = button("add_folder", "Add all")
        refresh = button("refresh", "Refresh")
        clear = button("clear", "Clear")
    demo_button = widget(
        gr.Button, "demo", value="Create four small demo checkpoints", visible=demo
    )
    table = html("checkpoints_table")
    return PickerPanel(checkpoints, folder, add, refresh, clear, demo_button, table, _groups())


def _groups() -> GroupWidgets:
    names = widget(gr.Textbox, "groups", value="", visible=False)
    with gr.Row(elem_id=elem_id("groups_row")):
        buttons = [
            button(f"group_{number}", f"Pick group {number}", visible=False)
            for number in range(1, 5)
        ]
    return GroupWidgets(names, *buttons)
