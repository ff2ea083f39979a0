"""Builds the panel that shows a run."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from hyper_merge.hosts.host import Host
from hyper_merge.ui.element_ids import elem_id
from hyper_merge.ui.html.common import format_merge_introduction
from hyper_merge.ui.panels.widgets import button, hidden_text, html, tags_box, widget


@dataclass(frozen=True)
class RunView:
    """The widgets that a run fills, in the order of `show_run`."""

    empty: gr.HTML
    group: gr.Column
    sentence: gr.HTML
    table: gr.HTML
    checkpoint: gr.Dropdown
    prompt: gr.Textbox
    note: gr.HTML
    explained: gr.HTML
    similarity: gr.HTML
    parts: gr.HTML
    run: gr.Textbox  # hidden: name of the run that is shown
    title: gr.Textbox  # hidden: title by which the host selects the hyper-model
    prompts: gr.Textbox  # hidden: tags by checkpoint, as JSON


@dataclass(frozen=True)
class ResultPanel:
    """The widgets of a run, with the buttons that lead on from it."""

    view: RunView
    copy: gr.Button
    send: gr.Button
    mix: gr.Button
    compare: gr.Button
    resize: gr.Button
    save_styles: gr.Button
    remove_styles: gr.Button
    sent: gr.Textbox  # hidden: what was sent last, as JSON


def build_result(host: Host) -> ResultPanel:
    """Builds card, prompt tags, buttons, table and plots of a run."""
    empty = html("result_empty", format_merge_introduction())
    with gr.Column(visible=False, elem_id=elem_id("result")) as group:
        with gr.Column(elem_id=elem_id("done")):
            sentence, checkpoint, prompt, buttons = _build_card(host)
            note = html("result_note")
        table = html("result_table")
        plots = [html(name) for name in ("explained_plot", "similarity_plot", "parts_plot")]
    hidden = [hidden_text(name) for name in ("shown_run", "hyper_title", "prompts")]
    view = RunView(*[empty, group, sentence, table, checkpoint, prompt, note, *plots, *hidden])
    return ResultPanel(view, *[*buttons, hidden_text("sent")])


def _build_card(host: Host) -> tuple[gr.HTML, gr.Dropdown, gr.Textbox, list[gr.Button]]:
    """Builds the card, the prompt of a checkpoint, and what can be done next."""
    sentence = html("sentence")
    checkpoint = widget(
        gr.Dropdown,
        "result_checkpoint",
        choices=[],
        label="Prompt for",
        info="Load the hyper-model and add these tags to the prompt to reproduce the checkpoint.",
    )
    prompt = tags_box("prompt")
    with gr.Row(elem_id=elem_id("prompt_row")):
        buttons = [
            button("copy", "Copy prompt"),
            button("send", "Try in txt2img", visible=host.has_txt2img),
            button("result_mix", "Mix"),
            button("result_compare", "Compare with the originals"),
            button("result_resize", "Another size"),
        ]
    with gr.Row(elem_id=elem_id("styles_row"), visible=host.has_txt2img):
        buttons += [
            button("styles_save", "Save styles", visible=host.has_txt2img),
            button("styles_remove", "Remove styles", visible=host.has_txt2img),
        ]
    return sentence, checkpoint, prompt, buttons
