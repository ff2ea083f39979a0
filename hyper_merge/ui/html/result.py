"""Formats the HTML that describes the result of a merge: its card, and the table of its checkpoints."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path
from statistics import fmean
from typing import Final

from hyper_merge.recipe.recipe import AVERAGE
from hyper_merge.runs.report import CheckpointReport, Report
from hyper_merge.runs.run import Run
from hyper_merge.runtime.formatting import format_count, format_size
from hyper_merge.ui.html.common import (
    format_dissimilar_groups,
    format_hint,
    format_message,
    format_percent,
    format_table,
    in_8_bits,
)
from hyper_merge.ui.html.names import format_names

_DIFFERENCE: Final = "Explained: the share of a checkpoint's difference from the hyper-model that the LoRAs reproduce"
_OF_OUTPUT: Final = f"{_DIFFERENCE}, counted by how much it changes what the network draws"
_EXPLAINED: Final = {
    "output": f"{_OF_OUTPUT}, as runs of the hyper-model measure it.",
    "layout": f"{_OF_OUTPUT}, as the layout suggests.",
    "relative": f"{_DIFFERENCE}, relative to the size of each layer.",
    "plain": f"{_DIFFERENCE}.",
}

_MEASURED: Final = f"{_OF_OUTPUT}, as runs of the networks measure it for random prompts."


def format_run_card(run: Run, *, is_new: bool = False) -> str:
    """Returns what a run made and where, the saved bytes and the explained shares.

    Args:
        run: the run.
        is_new: whether it was made just now, which the card says.
    """
    report = run.report
    explained = _MEASURED if report.is_measured else _EXPLAINED.get(report.metric)
    done = ' <span class="hm-chip hm-good">✓ Done</span>' if is_new else ""
    return (
        f"<div class=hm-card><h3>{_text(run.name)}{done}</h3><p>{_format_files(run)}</p>"
        + _format_figures(report)
        + format_hint(f"{explained or _EXPLAINED['plain']}{_in_weights(report)}")
        + _format_training(report)
        + _format_places(run)
        + "</div>"
        + _format_rounding(run)
        + _format_groups(report)
        + format_missing_files(run)
    )


def format_missing_files(run: Run) -> str:
    """Returns messages about files of a run that are missing, and about the consequences."""
    problems = "".join(format_message("bad", problem) for problem in run.problems)
    if not run.missing:
        return problems
    names = ", ".join(path.name for path in run.missing)
    return problems + format_message("bad", f"Missing: {names}. Merge again to recreate this run.")


def format_run_table(report: Report) -> str:
    """Returns the explained shares of every checkpoint, and its multiplier of each LoRA."""
    blocks = [f"LoRA {lora.rpartition('_')[2]}" for lora in report.loras]
    head = ("Checkpoint", "Explained", "In weights", "UNet", "Text encoder", *blocks)
    names = format_names([row.name for row in report.checkpoints])
    rows = [_result_row(*pair) for pair in zip(names, report.checkpoints, strict=True)]
    separate = any(row.text_multipliers for row in report.checkpoints)
    note = format_hint("Multipliers: text encoder : UNet.") if separate else ""
    return format_table(head, rows, numeric=range(1, len(head))) + note


def format_plot(png: bytes, description: str) -> str:
    """Returns a plot as an image, with its description for screen readers."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    image = f'<img class=hm-plot src="{source}" alt="{_text(description)}">'
    return f"<div class=hm-scroll>{image}</div>"


def _format_files(run: Run) -> str:
    report, file = run.report, _text(run.hyper_model.name)
    made = f"hyper-model {file} ({format_size(report.bytes_average)})"
    if run.recipe.base != AVERAGE:
        made = f"{file} as base"
    return (
        f"{len(report.checkpoints)} checkpoints ({format_size(report.bytes_before)}) → {made} +"
        f" {format_count(len(report.loras), 'LoRA')}"
        f" ({format_size(report.bytes_loras)}{in_8_bits(run.recipe)})"
    )


def _format_figures(report: Report) -> str:
    """Returns the saved bytes and the explained shares in large letters."""
    saved = report.bytes_before - report.bytes_average - report.bytes_loras
    figures = (
        (format_size(abs(saved)), "less on disk" if saved >= 0 else "more on disk"),
        (format_percent(report.fidelity_mean), "explained in the mean"),
        (format_percent(report.worst.fidelity), f"at worst: {report.worst.name}"),
    )
    cells = "".join(
        f"<div><dt>{_text(label)}</dt><dd>{value}</dd></div>" for value, label in figures
    )
    return f"<dl class=hm-figures>{cells}</dl>"


def _format_training(report: Report) -> str:
    """Returns what a training came to; nothing without one."""
    training = report.training
    if training is None:
        return ""
    if not training.has_gained:
        return format_hint("The training gained nothing: the LoRAs are as they were before it.")
    before, after = (format_percent(1 - fmean(x)) for x in (training.before, training.after))
    rounds = format_count(training.rounds, "round")
    if report.is_measured:
        return format_hint(f"Before a training of {rounds} the mean was {before}.")
    return format_hint(
        "The figures above are estimates, which a training does not go by. Measured by runs of the"
        f" networks for random prompts, the LoRAs without the private ones explain {after} in the mean,"
        f" and {before} before a training of {rounds}."
    )


def _in_weights(report: Report) -> str:
    """Returns the shares in weights, where those above are others."""
    if not report.shared_fidelity:
        return ""
    worst = min(row.explained for row in report.checkpoints)
    mean = format_percent(report.explained_mean)
    return (
        f" In weights, where all differences count alike: {mean} in the mean,"
        f" {format_percent(worst)} at worst."
    )


def _format_places(run: Run) -> str:
    """Returns the folders of what was made, each with a button that copies a path."""
    rows: list[tuple[str, Path, Path]] = [
        ("Hyper-model", run.hyper_model.parent, run.hyper_model),
        *(("LoRAs", lora.parent, lora.parent) for lora in run.loras[:1]),
        ("Report", run.folder, run.folder),
    ]
    return "".join(
        f"<div class=hm-place><span>{label}</span><code>{_format_path(folder)}</code>"
        f'<button type=button class=hm-small data-copy="{_text(str(path))}"'
        f' aria-label="Copy the path of: {label}">Copy path</button></div>'
        for label, folder, path in rows
    )


def _format_path(path: Path) -> str:
    """Returns a path that is broken between its folders, not within their names."""
    return re.sub(r"([/\\])", r"\1<wbr>", _text(str(path)))


def _format_groups(report: Report) -> str:
    names = [row.name for row in report.checkpoints]
    return (
        format_dissimilar_groups(names, report.groups, report.between_groups)
        if report.groups
        else ""
    )


def _format_rounding(run: Run) -> str:
    """Returns a hint where rounding costs much; the report file has all figures."""
    rounding = run.report.costly_rounding
    if rounding is None:
        return ""
    return format_hint(
        f"{rounding.hosts} rounds the weights after every LoRA, which loses"
        f" {format_percent(rounding.added)} of the checkpoints' differences. A single LoRA per checkpoint"
        f" is rounded only once: make them under Use, or with hyper-merge export {run.name}"
    )


def _result_row(name: str, row: CheckpointReport) -> tuple[str, ...]:
    shares = (row.fidelity, row.explained, row.explained_unet, row.explained_text_encoder)
    return (name, *(format_percent(share) for share in shares), *_multipliers(row))


def _multipliers(row: CheckpointReport) -> list[str]:
    if not row.text_multipliers:
        return [f"{x:.3f}" if x else "" for x in row.multipliers]
    pairs = zip(row.text_multipliers, row.multipliers, strict=True)
    return [f"{text:.2f} : {unet:.2f}" if text or unet else "" for text, unet in pairs]


def _text(text: str) -> str:
    return html.escape(text)
