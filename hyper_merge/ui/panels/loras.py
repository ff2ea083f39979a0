"""Builds the tab "LoRAs": a list to pick from, what is to be made of them, and what was made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import gradio as gr

from hyper_merge.ui.element_ids import elem_id
from hyper_merge.ui.handlers.loras import CHOICES, choice_of
from hyper_merge.ui.html.loras import format_lora_introduction, format_lora_picker
from hyper_merge.ui.panels.widgets import button, hidden_text, html, widget

_BLOCK_WEIGHTS: Final = (
    "For Stable Diffusion 1.x, 2.x, XL and Flux: how strongly each LoRA counts in every block, times its"
    " multiplier above. One line for each LoRA, in the order they were picked: one number for all"
    " blocks, or those of the extension LoRA Block Weight (lbw=), such as 1,0,0,... or"
    " NAME:1,0,0,..., or the name of a preset that it brings, such as OUTD. Leave empty for no"
    " difference."
)


@dataclass(frozen=True)
class LoraWidgets:
    """The widgets that become a `LoraForm`: the same names in the same order."""

    picked: (
        gr.Textbox
    )  # hidden by the style sheet: names and multipliers as JSON, for the script too
    choice: gr.Radio
    size: gr.Textbox
    checkpoint: gr.Dropdown
    run: gr.Dropdown
    name: gr.Textbox
    replace: gr.Checkbox
    block_weights: gr.Textbox


@dataclass(frozen=True)
class LoraPanel:
    """All widgets of the tab, whose lists are read again when it is opened."""

    opened: gr.Tab
    catalogue: gr.Textbox  # hidden: the host's list and what is known of each file, as JSON
    inspect: gr.Button  # hidden by the style sheet: the script presses it while it lacks facts
    add: gr.Button
    clear: gr.Button
    refresh: gr.Button
    form: LoraWidgets
    chosen: gr.Textbox  # hidden: the choice whose fields are shown
    about: gr.HTML
    advanced: gr.Accordion
    start: gr.Button
    stop: gr.Button
    message: gr.HTML
    status: gr.HTML
    result: gr.HTML
    wrote: gr.Textbox  # hidden: the task that wrote files last


def build_loras(opened: gr.Tab) -> LoraPanel:
    """Builds the list on top, what is to be made of the picked ones on the left, the result on the right."""
    gr.HTML("<h3>1. LoRAs</h3>")
    picked = widget(gr.Textbox, "lora_picked", value="[]", label="LoRAs")
    catalogue = hidden_text("lora_catalogue")
    html("lora_picker", format_lora_picker())
    inspect = button("lora_inspect", "Inspect more LoRAs")
    with gr.Row(elem_id=elem_id("lora_row")):
        add = button("lora_add", "Add all")
        clear = button("lora_clear", "Clear")
        refresh = button("lora_refresh", "Refresh")
    with gr.Row(elem_id=elem_id("lora_columns")):
        with gr.Column(min_width=380):
            about, advanced, form = _build_form(picked)
            with gr.Row(elem_id=elem_id("lora_run_row")):
                start = widget(
                    gr.Button,
                    "lora_start",
                    value=choice_of(None).button,
                    variant="primary",
                    scale=3,
                )
                stop = widget(
                    gr.Button, "lora_stop", value="Stop", interactive=False, scale=1, min_width=90
                )
            message, status = html("lora_message"), html("lora_status")
        with gr.Column(min_width=380):
            result = html("lora_result", format_lora_introduction())
    chosen = hidden_text("lora_chosen", next(iter(CHOICES)))
    wrote = hidden_text("lora_wrote")
    return LoraPanel(
        opened, catalogue, inspect, add, clear, refresh, form, chosen, about, advanced, start, stop, message,
        status, result, wrote,
    )  # fmt: skip


def _build_form(picked: gr.Textbox) -> tuple[gr.HTML, gr.Accordion, LoraWidgets]:
    first = choice_of(None)
    gr.HTML("<h3>2. What to make of them</h3>")
    choice = widget(
        gr.Radio,
        "lora_choice",
        choices=list(CHOICES),
        value=next(iter(CHOICES)),
        label="Make",
        info="Of the LoRAs that are picked above.",
    )
    about = html("lora_about", f"<p class=hm-hint>{first.about}</p>")
    checkpoint = _pick("lora_checkpoint", "Checkpoint", "It stays as it is; a new file is written.")
    run = _pick("lora_run", "Run", "Shared LoRAs that were distilled before.")
    size = _line("lora_size", "Size", first.size)
    name = _line("lora_name", "Name", first.name)
    replace = widget(gr.Checkbox, "lora_replace", value=False, label="Replace existing files")
    with gr.Accordion(
        "Advanced", open=False, visible=first.weighs, elem_id=elem_id("lora_advanced")
    ) as advanced:
        blocks = widget(
            gr.Textbox,
            "lora_block_weights",
            value="",
            label="Weights by block",
            info=_BLOCK_WEIGHTS,
            lines=2,
            max_lines=12,
        )
    form = LoraWidgets(picked, choice, size, checkpoint, run, name, replace, blocks)
    return about, advanced, form


def _line(name: str, label: str, info: str) -> Any:
    return widget(gr.Textbox, name, value="", label=label, info=info, max_lines=1)


def _pick(name: str, label: str, info: str) -> Any:
    return widget(gr.Dropdown, name, choices=[], value=None, label=label, info=info, visible=False)
