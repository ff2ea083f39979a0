"""Builds the panel that compares pictures by the LoRAs with pictures by the originals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from hyper_merge.hosts.host import GeneratorInfo, Host
from hyper_merge.ui.element_ids import elem_id
from hyper_merge.ui.panels.widgets import html, menu, widget


@dataclass(frozen=True)
class CompareWidgets:
    """The widgets that become a `CompareForm`: the same names in the same order."""

    run: gr.Dropdown
    checkpoints: gr.Dropdown
    prompts: gr.Textbox
    negative: gr.Textbox
    sampler: gr.Dropdown
    steps: gr.Number
    cfg_scale: gr.Number
    width: gr.Number
    height: gr.Number
    seeds: gr.Textbox
    average: gr.Checkbox
    difference: gr.Checkbox


@dataclass(frozen=True)
class ComparePanel:
    """The form, the buttons, and the comparison that is shown."""

    opened: gr.Tab
    form: CompareWidgets
    start: gr.Button
    stop: gr.Button
    message: gr.HTML
    status: gr.HTML
    earlier: gr.Dropdown
    comparison: gr.HTML


def build_compare(host: Host, opened: gr.Tab) -> ComparePanel:
    """Builds the panel in the tab `opened`, whose lists are read again when it is opened."""
    generator = host.generator_info()
    with gr.Row(elem_id=elem_id("compare_columns")):
        with gr.Column(scale=5, min_width=380):
            form = _build_form(generator)
            with gr.Row(elem_id=elem_id("compare_row")):
                start = widget(
                    gr.Button,
                    "compare",
                    value="Compare",
                    variant="primary",
                    scale=3,
                    interactive=not generator.problem,
                )
                stop = widget(
                    gr.Button,
                    "compare_stop",
                    value="Stop",
                    interactive=False,
                    scale=1,
                    min_width=90,
                )
            message, status = html("compare_message"), html("compare_status")
        with gr.Column(scale=6, min_width=420):
            earlier = widget(
                gr.Dropdown,
                "compare_earlier",
                choices=[],
                label="Earlier comparisons",
                info="Of this run, the newest first.",
                visible=False,
            )
            comparison = html("compare_shown")
    return ComparePanel(opened, form, start, stop, message, status, earlier, comparison)


def _build_form(generator: GeneratorInfo) -> CompareWidgets:
    run = menu("compare_run", "Run", "The merge whose checkpoints are drawn.")
    checkpoints = menu(
        "compare_checkpoints",
        "Checkpoints",
        "Each one is drawn twice: with the hyper-model and its LoRAs, and with the original.",
        several=True,
    )
    prompts = _text("compare_prompts", "Prompts", "One per line.", lines=3)
    negative = _text(
        "compare_negative", "Negative prompt", "What the pictures should not show.", lines=1
    )
    return CompareWidgets(
        run, checkpoints, prompts, negative, *_build_pictures(generator), *_build_additions()
    )


def _build_pictures(generator: GeneratorInfo) -> list[Any]:
    """Builds the settings of every picture."""
    with gr.Row():
        sampler = widget(
            gr.Dropdown,
            "compare_sampler",
            choices=list(generator.samplers),
            value=next(iter(generator.samplers), None),
            label="Sampler",
            info="How noise becomes a picture.",
            scale=2,
            min_width=200,
        )
        steps = _number("compare_steps", "Steps", "More take longer.", 20)
        cfg_scale = _number(
            "compare_cfg_scale", "CFG scale", "How strictly the prompt counts.", 7.0, whole=False
        )
    with gr.Row():
        width = _number("compare_width", "Width", "In pixels.", 512)
        height = _number("compare_height", "Height", "In pixels.", 512)
        seeds = widget(
            gr.Textbox,
            "compare_seeds",
            label="Seeds",
            info="A picture for each: 1, 2.",
            value="1",
            max_lines=1,
            min_width=100,
        )
    return [sampler, steps, cfg_scale, width, height, seeds]


def _build_additions() -> list[gr.Checkbox]:
    """Builds the choice of what is drawn in addition."""
    with gr.Row():
        return [
            widget(
                gr.Checkbox,
                "compare_average",
                value=False,
                label="Also draw the hyper-model alone",
                info="Shows what the LoRAs add to it.",
            ),
            widget(
                gr.Checkbox,
                "compare_difference",
                value=False,
                label="Also show the differences",
                info="Bright where two pictures differ.",
            ),
        ]


def _text(name: str, label: str, info: str, *, lines: int) -> gr.Textbox:
    return widget(gr.Textbox, name, label=label, info=info, lines=lines, value="")


def _number(name: str, label: str, info: str, value: float, *, whole: bool = True) -> gr.Number:
    precision = 0 if whole else None
    return widget(
        gr.Number, name, label=label, info=info, value=value, precision=precision, min_width=100
    )
