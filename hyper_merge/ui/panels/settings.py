"""What to make: the form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from hyper_merge.hosts.host import Host
from hyper_merge.recipe.recipe import DEFAULT_ITERATIONS, DEFAULT_TOLERANCE
from hyper_merge.ui.element_ids import elem_id
from hyper_merge.ui.form import (
    ALLOCATION_CHOICES,
    BASE_AVERAGE,
    DIFFERENCE_CHOICES,
    EXACT_CHOICES,
    LABELS,
    PRESETS,
    VAE_CHOICES,
)
from hyper_merge.ui.panels.widgets import button, widget


@dataclass(frozen=True)
class FormWidgets:
    """What becomes a `Form`: the same names in the same order."""

    checkpoints: gr.Dropdown
    name: gr.Textbox
    ranks: gr.Textbox
    weights: gr.Textbox
    base: gr.Dropdown
    dtype: gr.Radio
    lora_dtype: gr.Radio
    device: gr.Dropdown
    iterations: gr.Number
    tolerance: gr.Number
    seed: gr.Number
    vae: gr.Radio
    exact: gr.Radio
    topup: gr.Textbox
    allocation: gr.Radio
    separate: gr.Checkbox
    fit_weights: gr.Textbox
    layer_weights: gr.Radio
    save_styles: gr.Checkbox


def build_form(
    host: Host, checkpoints: gr.Dropdown, devices: Sequence[str]
) -> tuple[FormWidgets, list[gr.Button]]:
    """What to make, with the buttons that preset the ranks."""
    defaults = host.defaults()
    gr.HTML("<h3>2. What to make</h3>")
    name = widget(
        gr.Textbox,
        "name",
        label=LABELS["name"],
        info="Of the hyper-model and its LoRAs. Leave it empty for the suggestion.",
        max_lines=1,
    )
    ranks = widget(
        gr.Textbox,
        "ranks",
        value=defaults.ranks,
        label=LABELS["ranks"],
        info="One LoRA each, such as 128, 64, 32; or a size for all of them, such as 300 MB; or what"
        " is to come back of every checkpoint, such as 95 %.",
        max_lines=1,
    )
    with gr.Row(elem_id=elem_id("presets")):
        presets = [button(f"preset_{word}", text) for word, text in PRESETS.items()]
    save_styles = widget(
        gr.Checkbox,
        "save_styles",
        value=defaults.save_styles and host.has_txt2img,
        label="Save a style for every checkpoint",
        info="Pick the style in txt2img, and the hyper-model becomes that checkpoint.",
        visible=host.has_txt2img,
    )
    with gr.Accordion("Advanced", open=False, elem_id=elem_id("advanced")):
        advanced = _build_advanced(devices)
    return FormWidgets(*[checkpoints, name, ranks, *advanced, save_styles]), presets


def _build_advanced(devices: Sequence[str]) -> list[Any]:
    """The widgets from weights to differences, in the order of `FormWidgets`."""
    return [*_build_base(), *_build_solver(devices), *_build_contents(), *_build_fit()]


def _build_base() -> list[Any]:
    """Weights, base, stored precisions."""
    weights = widget(
        gr.Textbox,
        "weights",
        label=LABELS["weights"],
        info="One number per checkpoint for the average, in the order picked; empty for equal.",
        max_lines=1,
    )
    base = widget(
        gr.Dropdown,
        "base",
        choices=[BASE_AVERAGE],
        value=BASE_AVERAGE,
        label=LABELS["base"],
        info="What the LoRAs are added to. With a checkpoint as base no hyper-model is written.",
    )
    dtype = widget(
        gr.Radio,
        "dtype",
        choices=["float16", "bfloat16", "float32"],
        value="float16",
        label=LABELS["dtype"],
        info="Of the written files: 2, 2 or 4 bytes per number.",
    )
    lora_dtype = widget(
        gr.Radio,
        "lora_dtype",
        choices=["same", "float16", "bfloat16", "float32", "float8"],
        value="same",
        label=LABELS["lora_dtype"],
        info="The same, or their own. float8 takes half of the bytes and brings back a little less; it"
        " needs torch 2.1 (A1111 1.8), and is not for Apple's graphics.",
    )
    return [weights, base, dtype, lora_dtype]


def _build_solver(devices: Sequence[str]) -> list[Any]:
    """Device, iterations, tolerance, seed."""
    with gr.Row():
        device = widget(
            gr.Dropdown,
            "device",
            choices=list(devices),
            value="auto",
            label=LABELS["device"],
            info="Where it is computed; auto takes a graphics card where there is one.",
        )
        iterations = widget(
            gr.Number,
            "iterations",
            value=DEFAULT_ITERATIONS,
            precision=0,
            label=LABELS["iterations"],
            info="Sweeps at most; more take longer and may bring back a little more.",
        )
    with gr.Row():
        tolerance = widget(
            gr.Number,
            "tolerance",
            value=DEFAULT_TOLERANCE,
            label=LABELS["tolerance"],
            info="The last sweep is the one that gains less than this share.",
        )
        seed = widget(
            gr.Number,
            "seed",
            value=0,
            precision=0,
            label=LABELS["seed"],
            info="The same seed gives the same files.",
        )
    return [device, iterations, tolerance, seed]


def _build_contents() -> list[Any]:
    """VAE, companions."""
    vae = widget(
        gr.Radio,
        "vae",
        choices=list(VAE_CHOICES),
        value=next(iter(VAE_CHOICES)),
        label=LABELS["vae"],
        info="Which VAE the hyper-model gets.",
    )
    exact = widget(
        gr.Radio,
        "exact",
        choices=list(EXACT_CHOICES),
        value=next(iter(EXACT_CHOICES)),
        label=LABELS["exact"],
        info="Files beside the LoRAs with what those cannot hold, for the programs named.",
    )
    return [vae, exact]


def _build_fit() -> list[Any]:
    """Private LoRAs, where ranks go, separate multipliers, weights."""
    topup = widget(
        gr.Textbox,
        "topup",
        label=LABELS["topup"],
        info="For the checkpoints that come back least: a rank, such as 16, or a share that all are"
        " to reach, such as 95%. Empty for none.",
        max_lines=1,
    )
    allocation = _choice("allocation", ALLOCATION_CHOICES, "The LoRAs' bytes are the same.")
    separate = widget(
        gr.Checkbox,
        "separate",
        value=True,
        label=LABELS["multipliers"],
        info="As <lora:name:text encoder:UNet>; brings back more.",
    )
    fit_weights = widget(
        gr.Textbox,
        "fit_weights",
        label=LABELS["fit_weights"],
        info="One number per checkpoint, in the order picked: whose differences count more.",
        max_lines=1,
    )
    layer_weights = _choice(
        "layer_weights", DIFFERENCE_CHOICES, "What is brought back first: large or telling ones."
    )
    return [topup, allocation, separate, fit_weights, layer_weights]


def _choice(name: str, choices: Mapping[str, str], info: str) -> Any:
    words = list(choices)
    return widget(gr.Radio, name, choices=words, value=words[0], label=LABELS[name], info=info)
