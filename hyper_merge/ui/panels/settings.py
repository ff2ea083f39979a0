"""Builds the panel of settings, which is the form."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import gradio as gr

from hyper_merge.hosts.host import Host
from hyper_merge.ui.element_ids import elem_id
from hyper_merge.ui.form_fields import ADVANCED, BASE_AVERAGE, form_field
from hyper_merge.ui.panels.presets import PresetsPanel, build_presets
from hyper_merge.ui.panels.size import SizePanel, build_size
from hyper_merge.ui.panels.widgets import widget


@dataclass(frozen=True)
class FormWidgets:
    """The widgets that become a `Form`: the same names in the same order."""

    checkpoints: gr.Textbox
    name: gr.Textbox
    ranks: gr.Textbox
    weights: gr.Textbox
    block_weights: gr.Textbox
    base: gr.Dropdown
    dtype: gr.Radio
    lora_dtype: gr.Radio
    device: gr.Dropdown
    iterations: gr.Number
    tolerance: gr.Number
    seed: gr.Number
    memory: gr.Textbox
    vae: gr.Radio
    exact: gr.Radio
    topup: gr.Textbox
    allocation: gr.Radio
    separate: gr.Checkbox
    fit_weights: gr.Textbox
    layer_weights: gr.Radio
    training: gr.Textbox
    damaged: gr.Radio
    save_styles: gr.Checkbox


def build_form(
    host: Host, checkpoints: gr.Textbox, devices: Sequence[str]
) -> tuple[PresetsPanel, FormWidgets, list[gr.Button], SizePanel]:
    """Builds the presets, the form, the buttons that fill in its ranks, and the fields of a size.

    Args:
        host: the program around the tab.
        checkpoints: the picker's widget, which is the form's first field.
        devices: names of the devices to choose from.
    """
    defaults = host.defaults()
    gr.HTML("<h3>2. Settings</h3>")
    preset = build_presets()
    size, presets = build_size()
    widgets = {
        "checkpoints": checkpoints,
        "ranks": _build_field("ranks", value=defaults.ranks),  # the fields of a size write it
        "name": _build_field("name"),
    }
    widgets["save_styles"] = widget(
        gr.Checkbox,
        "save_styles",
        value=defaults.save_styles and host.has_txt2img,
        label="Save a prompt style for every checkpoint",
        info="Pick the style in txt2img to turn the hyper-model into that checkpoint.",
        visible=host.has_txt2img,
    )
    with gr.Accordion("Advanced", open=False, elem_id=elem_id("advanced")):
        widgets |= _build_advanced(devices)
    return preset, FormWidgets(**widgets), presets, size


def _build_advanced(devices: Sequence[str]) -> dict[str, Any]:
    """Builds the groups of fields under "Advanced"; returns the widgets by name."""
    special: dict[str, dict[str, Any]] = {
        "base": {"choices": [BASE_AVERAGE], "value": BASE_AVERAGE},
        "device": {"choices": list(devices)},
    }
    widgets: dict[str, Any] = {}
    for title, rows in ADVANCED.items():
        gr.HTML(f"<h4>{title}</h4>")
        for names in rows:
            with gr.Row() if len(names) > 1 else nullcontext():
                widgets |= {name: _build_field(name, **special.get(name, {})) for name in names}
    return widgets


def _build_field(name: str, **special: Any) -> Any:
    """Builds the widget of a field; `special` replaces arguments that the tables give."""
    field = form_field(name)
    arguments: dict[str, Any] = {
        "label": field.label,
        "info": field.info,
        "value": field.default,
        **special,
    }
    if field.kind == "text":
        return widget(gr.Textbox, name, max_lines=1, **arguments)
    if field.kind == "lines":
        return widget(gr.Textbox, name, lines=2, max_lines=12, **arguments)
    if field.kind == "number":
        precision = 0 if isinstance(field.default, int) else None
        return widget(gr.Number, name, precision=precision, **arguments)
    if field.kind == "radio":
        return widget(gr.Radio, name, choices=list(field.options), **arguments)
    if field.kind == "menu":
        return widget(gr.Dropdown, name, **arguments)
    return widget(gr.Checkbox, name, **arguments)
