"""The widgets of the tab, panel by panel; what happens on a click is wired in `tab`.

Each builder returns its widgets as a frozen dataclass; `in_order` lists them as gradio wants them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import gradio as gr

from hyper_merge.hosts.host import Host
from hyper_merge.recipe import DEFAULT_ITERATIONS, DEFAULT_TOLERANCE
from hyper_merge.ui.element_ids import elem_id
from hyper_merge.ui.form import BASE_AVERAGE, EXACT_CHOICES, LABELS, PRESETS, VAE_CHOICES
from hyper_merge.ui.views import introduction

Widget = TypeVar("Widget")


@dataclasses.dataclass(frozen=True)
class FormWidgets:
    """What becomes a `Form`: the same names in the same order."""

    checkpoints: gr.Dropdown
    name: gr.Textbox
    ranks: gr.Textbox
    weights: gr.Textbox
    base: gr.Dropdown
    dtype: gr.Radio
    device: gr.Dropdown
    iterations: gr.Number
    tolerance: gr.Number
    seed: gr.Number
    vae: gr.Radio
    exact: gr.Radio
    save_styles: gr.Checkbox


@dataclasses.dataclass(frozen=True)
class PickerPanel:
    """Which checkpoints."""

    checkpoints: gr.Dropdown
    folder: gr.Dropdown
    add: gr.Button
    refresh: gr.Button
    clear: gr.Button
    demo: gr.Button
    table: gr.HTML


@dataclasses.dataclass(frozen=True)
class RunPanel:
    """The button, and how far it is."""

    plan: gr.HTML
    replan: gr.Button  # hidden by the style sheet: the scripts press it when the form has changed
    merge: gr.Button
    stop: gr.Button
    message: gr.HTML
    status: gr.HTML


@dataclasses.dataclass(frozen=True)
class ResultPanel:
    """What was made."""

    empty: gr.HTML
    group: gr.Column
    sentence: gr.HTML
    table: gr.HTML
    checkpoint: gr.Dropdown
    prompt: gr.Textbox
    copy: gr.Button
    send: gr.Button
    save_styles: gr.Button
    remove_styles: gr.Button
    note: gr.HTML
    explained: gr.Plot
    similarity: gr.Plot
    parts: gr.Plot
    run: gr.Textbox  # hidden: the run that is shown
    title: gr.Textbox  # hidden: by what the host selects the hyper-model
    prompts: gr.Textbox  # hidden: tags by checkpoint, as JSON


@dataclasses.dataclass(frozen=True)
class HistoryPanel:
    """Earlier runs."""

    table: gr.HTML
    run: gr.Dropdown
    other: gr.Dropdown
    open: gr.Button
    copy: gr.Button
    compare: gr.Button
    delete: gr.Button
    confirm: gr.Button
    cancel: gr.Button
    refresh: gr.Button
    outcome: gr.HTML
    cache: gr.HTML
    clear: gr.Button


def in_order(panel: Any) -> list[Any]:
    """The widgets of a panel, in the order of its fields."""
    return [getattr(panel, field.name) for field in dataclasses.fields(panel)]


def build_picker(names: Sequence[str], folders: Sequence[str], *, demo: bool) -> PickerPanel:
    """Checkpoints, and what they are."""
    gr.HTML("<h3>1. Checkpoints</h3>")
    checkpoints = _widget(
        gr.Dropdown,
        "checkpoints",
        choices=list(names),
        value=[],
        multiselect=True,
        label="Checkpoints",
        info="Two or more of one family. Type to search.",
    )
    with gr.Row(elem_id=elem_id("picker_row")):
        folder = _widget(
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
        add = _button("add_folder", "Add all")
        refresh = _button("refresh", "Refresh")
        clear = _button("clear", "Clear")
    demo_button = _widget(
        gr.Button, "demo", value="Make four small checkpoints to try it with", visible=demo
    )
    return PickerPanel(
        checkpoints, folder, add, refresh, clear, demo_button, _html("checkpoints_table")
    )


def build_form(
    host: Host, checkpoints: gr.Dropdown, devices: Sequence[str]
) -> tuple[FormWidgets, list[gr.Button]]:
    """What to make, with the buttons that preset the ranks."""
    defaults = host.defaults()
    gr.HTML("<h3>2. What to make</h3>")
    name = _widget(
        gr.Textbox,
        "name",
        label=LABELS["name"],
        info="Of the hyper-model and its LoRAs. Leave it empty for the suggestion.",
        max_lines=1,
    )
    ranks = _widget(
        gr.Textbox,
        "ranks",
        value=defaults.ranks,
        label=LABELS["ranks"],
        info="One LoRA each. Higher ranks bring back more and take more space.",
        max_lines=1,
    )
    with gr.Row(elem_id=elem_id("presets")):
        presets = [_button(f"preset_{word}", text) for word, text in PRESETS.items()]
    save_styles = _widget(
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


def build_run() -> RunPanel:
    """What it will take, the button, and progress."""
    gr.HTML("<h3>3. Merge</h3>")
    plan = _html("plan")
    replan = _button("replan", "Look again")
    with gr.Row(elem_id=elem_id("run_row")):
        merge = _widget(gr.Button, "merge", value="Merge", variant="primary", scale=3)
        stop = _widget(gr.Button, "stop", value="Stop", interactive=False, scale=1, min_width=90)
    return RunPanel(plan, replan, merge, stop, _html("message"), _html("status"))


def build_result(host: Host) -> ResultPanel:
    """Sentence, table, prompt, plots."""
    empty = _html("result_empty", introduction())
    with gr.Column(visible=False, elem_id=elem_id("result")) as group:
        sentence, table = _html("sentence"), _html("result_table")
        checkpoint = _widget(
            gr.Dropdown,
            "result_checkpoint",
            choices=[],
            label="Prompt for",
            info="Load the hyper-model and put this into the prompt to get the checkpoint back.",
        )
        prompt = _widget(
            gr.Textbox,
            "prompt",
            label="Prompt tags",
            show_label=False,
            container=False,
            lines=2,
            interactive=True,
        )
        with gr.Row(elem_id=elem_id("prompt_row")):
            copy = _button("copy", "Copy")
            send = _button("send", "Send to txt2img", visible=host.has_txt2img)
            save = _button("styles_save", "Save styles", visible=host.has_txt2img)
            remove = _button("styles_remove", "Remove styles", visible=host.has_txt2img)
        note = _html("result_note")
        plots = [
            _widget(gr.Plot, name, show_label=False)
            for name in ("explained_plot", "similarity_plot", "parts_plot")
        ]
    hidden = [
        _widget(gr.Textbox, name, value="", visible=False)
        for name in ("shown_run", "hyper_title", "prompts")
    ]
    return ResultPanel(
        empty, group, sentence, table, checkpoint, prompt, copy, send, save, remove, note,
        *plots, *hidden,
    )  # fmt: skip


def build_history() -> HistoryPanel:
    """Runs that were made before, and the cache."""
    table = _html("runs_table")
    with gr.Row():
        run = _widget(gr.Dropdown, "run", choices=[], label="Run")
        other = _widget(gr.Dropdown, "other_run", choices=[], label="Compare with")
    with gr.Row(elem_id=elem_id("runs_row")):
        opened = _button("run_open", "Open")
        copied = _button("run_copy", "Copy its settings to the form")
        compare = _button("run_compare", "Compare")
        delete = _button("run_delete", "Delete …")
        refresh = _button("runs_refresh", "Refresh")
    outcome = _html("run_outcome")
    with gr.Row():
        confirm = _widget(
            gr.Button, "run_confirm", value="Delete these files", variant="stop", visible=False
        )
        cancel = _button("run_cancel", "Keep them", visible=False)
    with gr.Row(elem_id=elem_id("cache_row")):
        cache = _html("cache")
        clear = _button("cache_clear", "Clear the cache")
    return HistoryPanel(
        table, run, other, opened, copied, compare, delete, confirm, cancel, refresh, outcome,
        cache, clear,
    )  # fmt: skip


def _build_advanced(devices: Sequence[str]) -> list[Any]:
    """The widgets from weights to companions, in the order of `FormWidgets`."""
    return [*_build_base(), *_build_solver(devices), *_build_contents()]


def _build_base() -> list[Any]:
    """Weights, base, stored precision."""
    weights = _widget(
        gr.Textbox,
        "weights",
        label=LABELS["weights"],
        info="One number per checkpoint for the average, in the order picked; empty for equal.",
        max_lines=1,
    )
    base = _widget(
        gr.Dropdown,
        "base",
        choices=[BASE_AVERAGE],
        value=BASE_AVERAGE,
        label=LABELS["base"],
        info="What the LoRAs are added to. With a checkpoint as base no hyper-model is written.",
    )
    dtype = _widget(
        gr.Radio,
        "dtype",
        choices=["float16", "bfloat16", "float32"],
        value="float16",
        label=LABELS["dtype"],
        info="Of the written files: 2, 2 or 4 bytes per number.",
    )
    return [weights, base, dtype]


def _build_solver(devices: Sequence[str]) -> list[Any]:
    """Device, iterations, tolerance, seed."""
    with gr.Row():
        device = _widget(
            gr.Dropdown,
            "device",
            choices=list(devices),
            value="auto",
            label=LABELS["device"],
            info="Where it is computed.",
        )
        iterations = _widget(
            gr.Number,
            "iterations",
            value=DEFAULT_ITERATIONS,
            precision=0,
            label=LABELS["iterations"],
            info="Sweeps at most.",
        )
    with gr.Row():
        tolerance = _widget(
            gr.Number,
            "tolerance",
            value=DEFAULT_TOLERANCE,
            label=LABELS["tolerance"],
            info="A sweep that gains less than this share is the last.",
        )
        seed = _widget(
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
    vae = _widget(
        gr.Radio,
        "vae",
        choices=list(VAE_CHOICES),
        value=next(iter(VAE_CHOICES)),
        label=LABELS["vae"],
        info="Which VAE the hyper-model gets.",
    )
    exact = _widget(
        gr.Radio,
        "exact",
        choices=list(EXACT_CHOICES),
        value=next(iter(EXACT_CHOICES)),
        label=LABELS["exact"],
        info="Files beside the LoRAs with what those cannot hold, for the programs named.",
    )
    return [vae, exact]


def _button(name: str, text: str, *, visible: bool = True) -> gr.Button:
    return _widget(gr.Button, name, value=text, size="sm", min_width=90, visible=visible)


def _html(name: str, value: str = "") -> gr.HTML:
    return _widget(gr.HTML, name, value=value)


def _widget(kind: Callable[..., Widget], name: str, **settings: Any) -> Widget:
    """A widget with our id, whose value the WebUI does not keep between starts."""
    widget = kind(elem_id=elem_id(name), **settings)
    widget.do_not_save_to_config = True  # type: ignore[attr-defined]
    return widget
