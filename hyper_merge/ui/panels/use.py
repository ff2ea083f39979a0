"""Builds the panels of the tab "Use": mix, fit, restore, export, check of originals, extract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import gradio as gr

from hyper_merge.hosts.host import Host
from hyper_merge.ui.element_ids import elem_id
from hyper_merge.ui.panels.use_more import (
    ACCEPT_DAMAGED,
    MorePanel,
    build_export,
    build_extract,
    build_restore,
    build_safe,
)
from hyper_merge.ui.panels.widgets import (
    button,
    checkbox,
    explain,
    hidden_text,
    html,
    line,
    menu,
    tags_box,
    widget,
)

_BLOCK_WEIGHTS: Final = (
    "For the extension LoRA Block Weight: how strongly all LoRAs count in every block, such as 1,0,0,..."
    " or the name of one of its presets. Only the prompt tags have it, no saved checkpoint."
)


@dataclass(frozen=True)
class ListedRun:
    """The widgets that a run fills, in the order of `list_usable_runs`."""

    run: gr.Dropdown
    known: gr.Textbox  # hidden: the runs that were listed before, as JSON
    about: gr.HTML
    sliders: gr.HTML
    title: gr.Textbox  # hidden: title by which the host selects the hyper-model
    restored: gr.Dropdown
    exported: gr.Dropdown
    fitted: gr.Dropdown
    base: gr.Dropdown
    target: gr.Dropdown


@dataclass(frozen=True)
class Outcomes:
    """The widgets that a job fills, in the order of `show_outcome`."""

    mix: gr.HTML
    fit: gr.HTML
    restore: gr.HTML
    export: gr.HTML
    safe: gr.HTML
    extract: gr.HTML
    tags_group: gr.Column
    tags: gr.Textbox
    fitted: gr.Textbox  # hidden: run and name of the fit whose tags are shown, as JSON
    title: gr.Textbox  # hidden: title by which the host selects its hyper-model
    wrote: gr.Textbox  # hidden: the task that wrote files last


@dataclass(frozen=True)
class MixPanel:
    """The widgets of the sliders."""

    tags: gr.Textbox
    equal: gr.Button
    reset: gr.Button
    copy: gr.Button
    send: gr.Button
    note: gr.HTML
    name: gr.Textbox
    write: gr.Button
    blocks: gr.Textbox
    shares: gr.Textbox  # hidden: by checkpoint, as JSON
    sent: gr.Textbox  # hidden: what was sent last, as JSON


@dataclass(frozen=True)
class FitPanel:
    """The widgets that fit a checkpoint."""

    topup: gr.Textbox
    name: gr.Textbox
    replace: gr.Checkbox
    damaged: gr.Checkbox
    fit: gr.Button
    absorb: gr.Button
    copy: gr.Button
    send: gr.Button
    save_style: gr.Button
    note: gr.HTML
    sent: gr.Textbox  # hidden: what was sent last, as JSON


@dataclass(frozen=True)
class UsePanel:
    """All widgets of the tab "Use", whose lists are read again when it is opened."""

    opened: gr.Tab
    refresh: gr.Button
    stop: gr.Button
    message: gr.HTML
    status: gr.HTML
    listed: ListedRun
    outcomes: Outcomes
    mix: MixPanel
    fit: FitPanel
    more: MorePanel


def build_use(host: Host, opened: gr.Tab) -> UsePanel:
    """Builds run and progress on top, the sliders on the left, the other panels on the right."""
    with gr.Row(elem_id=elem_id("use_row")):
        run = widget(
            gr.Dropdown,
            "use_run",
            choices=[],
            label="Run",
            info="The merge whose hyper-model and LoRAs are used here.",
            scale=4,
        )
        refresh = button("use_refresh", "Refresh")
        stop = widget(
            gr.Button, "use_stop", value="Stop", interactive=False, size="sm", min_width=90
        )
    about, message, status = html("use_about"), html("use_message"), html("use_status")
    known, title, *states = (
        hidden_text(name)
        for name in ("use_known", "use_title", "fit_shown", "fit_title", "use_wrote")
    )
    with gr.Row(elem_id=elem_id("use_columns")):
        with gr.Column(scale=5, min_width=380):
            sliders, mix, mix_outcome = _build_mix(host)
        with gr.Column(scale=6, min_width=420):
            fitted, fit, fit_outcome, (group, tags) = _build_fit(host)
            restored, restore, restore_outcome = build_restore()
            exported, export, export_outcome = build_export()
            safe, safe_outcome = build_safe()
            pair, extract, extract_outcome = build_extract()
    outcomes = (
        mix_outcome,
        fit_outcome,
        restore_outcome,
        export_outcome,
        safe_outcome,
        extract_outcome,
    )
    return UsePanel(
        opened,
        refresh,
        stop,
        message,
        status,
        ListedRun(run, known, about, sliders, title, restored, exported, fitted, *pair),
        Outcomes(*outcomes, group, tags, *states),
        mix,
        fit,
        MorePanel(*restore, *export, *safe, *extract),
    )


def _build_mix(host: Host) -> tuple[gr.HTML, MixPanel, gr.HTML]:
    gr.HTML("<h3>Mix</h3>")
    explain("How much of each checkpoint pictures should have; the prompt tags follow at once.")
    sliders = html("mix")
    with gr.Row(elem_id=elem_id("mix_row")):
        equal = button("mix_equal", "Equal shares")
        reset = button("mix_reset", "Reset")
    with gr.Accordion(
        "Advanced", open=False, visible=host.takes_block_weights, elem_id=elem_id("mix_advanced")
    ):
        blocks = line("mix_block_weights", "Weights by block", _BLOCK_WEIGHTS)
    tags = tags_box("mix_prompt")
    with gr.Row(elem_id=elem_id("mix_prompt_row")):
        copy = button("mix_copy", "Copy")
        send = button("mix_send", "Send to txt2img", visible=host.has_txt2img)
    note = html("mix_note")
    name = line("mix_name", "Name", "Name of the file. Leave empty for the suggested name.")
    write = button("mix_write", "Save as checkpoint")
    hidden = [hidden_text(text) for text in ("mix_shares", "mix_sent")]
    outcome = html("mix_outcome")
    return sliders, MixPanel(
        tags, equal, reset, copy, send, note, name, write, blocks, *hidden
    ), outcome  # fmt: skip


def _build_fit(host: Host) -> tuple[gr.Dropdown, FitPanel, gr.HTML, tuple[gr.Column, gr.Textbox]]:
    with gr.Accordion("Fit another checkpoint", open=True, elem_id=elem_id("fit_panel")):
        explain(
            "Finds the prompt tags by which the LoRAs of this run come closest to a checkpoint that"
            " was not merged."
        )
        picked = menu(
            "fit_checkpoint", "Checkpoint", "Of the same family, but not part of the run."
        )
        with gr.Row():
            topup = line(
                "fit_topup",
                "Private LoRA",
                "An extra LoRA that brings it closer: a rank, such as 16, or the share to reach, such"
                " as 95%. Leave empty for none.",
            )
            name = line(
                "fit_name",
                "Name",
                "Name of the fit, or of the new run. Leave empty for the suggested name.",
            )
        with gr.Row():
            replace = checkbox("fit_replace", "Replace an earlier fit of this name")
            damaged = checkbox("fit_damaged", ACCEPT_DAMAGED)
        with gr.Row(elem_id=elem_id("fit_row")):
            fit = button("fit", "Fit")
            absorb = button("absorb", "Merge into a new run")
        outcome = html("fit_outcome")
        with gr.Column(visible=False, elem_id=elem_id("fit_group")) as group:
            tags = tags_box("fit_prompt")
            with gr.Row(elem_id=elem_id("fit_prompt_row")):
                copy = button("fit_copy", "Copy")
                send = button("fit_send", "Send to txt2img", visible=host.has_txt2img)
                style = button("fit_style", "Save style", visible=host.has_txt2img)
            note, sent = html("fit_note"), hidden_text("fit_sent")
    panel = FitPanel(topup, name, replace, damaged, fit, absorb, copy, send, style, note, sent)
    return picked, panel, outcome, (group, tags)
