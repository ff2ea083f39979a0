"""Builds the panels of the tab "Use" that have few widgets: restore, export, check of originals, extract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import gradio as gr

from hyper_merge.ui.element_ids import elem_id
from hyper_merge.ui.handlers.use import SAME_PRECISION
from hyper_merge.ui.panels.widgets import button, checkbox, explain, html, line, menu, widget

ACCEPT_DAMAGED: Final = "Accept files that look damaged, with a warning"


@dataclass(frozen=True)
class MorePanel:
    """The widgets of the panels that have few of them."""

    restore_dtype: gr.Radio
    restore_name: gr.Textbox
    restore: gr.Button
    export_rank: gr.Textbox
    export_replace: gr.Checkbox
    export: gr.Button
    threshold: gr.Textbox
    safe: gr.Button
    extract_rank: gr.Textbox
    extract_name: gr.Textbox
    extract_damaged: gr.Checkbox
    extract: gr.Button


def build_restore() -> tuple[gr.Dropdown, list[Any], gr.HTML]:
    """Builds the panel that writes a checkpoint: its menu, the other widgets, its outcome."""
    with gr.Accordion("Restore a checkpoint", open=False, elem_id=elem_id("restore_panel")):
        explain(
            "Writes a whole checkpoint from hyper-model and LoRAs, and says how close it comes to the"
            " original."
        )
        picked = menu(
            "restore_checkpoint",
            "Checkpoint",
            "A checkpoint of the run, or one that was fitted later.",
        )
        dtype = widget(
            gr.Radio,
            "restore_dtype",
            choices=[SAME_PRECISION, "float16", "bfloat16", "float32"],
            value=SAME_PRECISION,
            label="Precision",
            info="Of the written file. float32 takes twice the space, for pictures that hardly differ.",
        )
        name = line("restore_name", "Name", "Name of the file. Leave empty for the suggested name.")
        write = button("restore", "Restore")
        outcome = html("restore_outcome")
    return picked, [dtype, name, write], outcome


def build_export() -> tuple[gr.Dropdown, list[Any], gr.HTML]:
    """Builds the panel that writes one LoRA per checkpoint: its menu, the other widgets, its outcome."""
    with gr.Accordion("One LoRA per checkpoint", open=False, elem_id=elem_id("export_panel")):
        explain("Joins what a prompt needs of the shared LoRAs into one LoRA for each checkpoint.")
        picked = menu(
            "export_checkpoints",
            "Checkpoints",
            "Leave empty for all checkpoints of the run.",
            several=True,
        )
        rank = line(
            "export_rank",
            "Rank",
            "Makes each LoRA smaller, such as 64; pictures come less close. Leave empty to keep all.",
        )
        replace = checkbox("export_replace", "Replace existing files")
        write = button("export", "Export")
        outcome = html("export_outcome")
    return picked, [rank, replace, write], outcome


def build_safe() -> tuple[list[Any], gr.HTML]:
    """Builds the panel that checks the originals: its widgets, and its outcome."""
    with gr.Accordion("Which originals can be deleted?", open=False, elem_id=elem_id("safe_panel")):
        threshold = line(
            "safe_threshold",
            "Threshold",
            "How much of what makes an original different the run must bring back, before it counts as"
            " deletable. Nothing is deleted here.",
            "99%",
        )
        write = button("safe", "Check")
        outcome = html("safe_outcome")
    return [threshold, write], outcome


def build_extract() -> tuple[tuple[gr.Dropdown, gr.Dropdown], list[Any], gr.HTML]:
    """Builds the panel that makes a LoRA of two checkpoints: its menus, the other widgets, its outcome."""
    with gr.Accordion("LoRA from two checkpoints", open=False, elem_id=elem_id("extract_panel")):
        explain("Writes the difference between any two checkpoints as a LoRA; no run is needed.")
        base = menu("extract_base", "From", "The checkpoint to which the LoRA is added.")
        target = menu("extract_checkpoint", "To", "The checkpoint that results.")
        with gr.Row():
            rank = line(
                "extract_rank",
                "Rank",
                "A higher rank brings pictures closer and takes more space.",
                "64",
            )
            name = line(
                "extract_name", "Name", "Name of the LoRA. Leave empty for the suggested name."
            )
        damaged = checkbox("extract_damaged", ACCEPT_DAMAGED)
        write = button("extract", "Extract")
        outcome = html("extract_outcome")
    return (base, target), [rank, name, damaged, write], outcome
