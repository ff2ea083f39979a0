"""Handles the panel that shows a run: figures, prompt tags, styles.

Handlers take and return plain values or `gr.update(...)`, no widgets. The first arguments come from the
wiring (the host, the process's jobs), the rest from the browser. A refusal becomes a message, never an
error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

import gradio as gr

from hyper_merge.errors import HyperMergeError, UnknownRunError
from hyper_merge.hosts.host import Host
from hyper_merge.runs.fit_records import prompts_of, styles_of
from hyper_merge.runs.lora_runs import is_lora_run
from hyper_merge.runs.report import Report
from hyper_merge.runs.run import load_run
from hyper_merge.ui.html.common import format_merge_introduction, format_message
from hyper_merge.ui.html.result import format_plot, format_run_card, format_run_table
from hyper_merge.ui.plots.canvas import draw_png
from hyper_merge.ui.plots.description import (
    describe_explained,
    describe_parts,
    describe_similarity,
)
from hyper_merge.ui.plots.report import explained_plot, parts_plot, similarity_plot

NOTHING: Final = ("", *(gr.update(),) * 12)
"""Values that clear the panel's message and leave its other widgets as they are."""


def show_run(host: Host, name: str | None, *, is_new: bool = False) -> tuple[Any, ...]:
    """Returns the values of the panel's widgets, in their order, for a run.

    Args:
        host: the program around the tab.
        name: of the run.
        is_new: whether it was made just now.
    """
    if is_lora_run(host.folders(), name or ""):  # which the tab "LoRAs" shows
        return (gr.update(), *NOTHING[1:])
    try:
        run = load_run(host.folders(), name or "")
    except HyperMergeError as error:
        return (format_message("bad", str(error)), gr.update(visible=False), *NOTHING[2:])
    report, prompts = run.report, prompts_of(run)
    names = list(prompts)
    return (
        "",
        gr.update(visible=True),
        format_run_card(run, is_new=is_new),
        format_run_table(report),
        gr.update(choices=names, value=names[0]),
        prompts[names[0]],
        "",
        *_plots(report),
        run.name,
        host.checkpoint_title(run.hyper_model) or "",
        json.dumps(prompts),
    )


def hide_deleted_run(host: Host, name: str) -> tuple[Any, ...]:
    """Takes a run that is gone off the panel; changes nothing as long as it is there."""
    if name and is_deleted(host, name):
        return (format_merge_introduction(), gr.update(visible=False), *NOTHING[2:])
    return (gr.update(),) * len(NOTHING)


def is_deleted(host: Host, name: str) -> bool:
    """Tells whether there is no run of a name any more; a damaged one is there."""
    try:
        load_run(host.folders(), name)
    except HyperMergeError as error:
        return isinstance(error, UnknownRunError)
    return False


def _plots(report: Report) -> Iterator[str]:
    """Yields the three plots as HTML."""
    yield format_plot(draw_png(explained_plot(report)), describe_explained(report))
    yield format_plot(draw_png(similarity_plot(report)), describe_similarity(report))
    yield format_plot(draw_png(parts_plot(report)), describe_parts(report))


def save_run_styles(host: Host, name: str) -> str:
    """Saves a style for every checkpoint of a run."""
    try:
        run = load_run(host.folders(), name)
        styles = styles_of(run)
        host.save_styles(styles)
    except HyperMergeError as error:
        return format_message("bad", str(error))
    return format_message(
        "good",
        f"Saved {len(styles)} styles, named {run.name}: … Pick one in txt2img.",
    )


def remove_run_styles(host: Host, name: str) -> str:
    """Removes the styles of a run."""
    try:
        names = styles_of(load_run(host.folders(), name)).keys() & host.styles().keys()
        host.remove_styles(names)
    except HyperMergeError as error:
        return format_message("bad", str(error))
    return format_message(
        "good", f"Removed {len(names)} styles." if names else "No styles to remove."
    )
