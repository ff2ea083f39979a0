"""Formats the HTML that describes runs: summary, tables, comparisons; every name is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from hyper_merge.recipe.recipe import AVERAGE
from hyper_merge.runs.report import CheckpointReport, Report
from hyper_merge.runs.run import Run
from hyper_merge.runtime.formatting import format_size
from hyper_merge.ui.form import format_requested_size
from hyper_merge.ui.html.common import (
    format_count,
    format_dissimilar_groups,
    format_hint,
    format_message,
    format_percent,
    format_table,
)
from hyper_merge.ui.html.names import format_names

_DIFFERENCE: Final = "Explained: the share of a checkpoint's difference from the hyper-model that the LoRAs reproduce"
_OF_OUTPUT: Final = f"{_DIFFERENCE}, counted by what it does to the network's output"
_EXPLAINED: Final = {
    "output": f"{_OF_OUTPUT}, as runs of the hyper-model measure it.",
    "layout": f"{_OF_OUTPUT}, as the layout suggests.",
    "relative": f"{_DIFFERENCE}, relative to the size of each layer.",
    "plain": f"{_DIFFERENCE}.",
}


def format_run_summary(run: Run) -> str:
    """Returns the files that went into a run and came out, the saved bytes and the explained shares."""
    report = run.report
    worst = report.worst
    after = report.bytes_average + report.bytes_loras
    saved = report.bytes_before - after
    less = f"{format_size(saved)} less" if saved >= 0 else f"{format_size(-saved)} more"
    file = _text(run.hyper_model.name)
    made = f"hyper-model {file} ({format_size(report.bytes_average)})"
    if run.recipe.base != AVERAGE:
        made = f"{file} as base"
    return (
        f"<p><b>{_text(run.name)}</b>: {len(report.checkpoints)} checkpoints ({format_size(report.bytes_before)}) "
        f"→ {made} + {format_count(len(report.loras), 'LoRA')} ({format_size(report.bytes_loras)}), "
        f"<b>{less}</b>. Explained: <b>{format_percent(report.fidelity_mean)}</b> as the mean over checkpoints, "
        f"<b>{format_percent(worst.fidelity)}</b> at worst ({_text(worst.name)}).</p>"
        f"<p class=hm-hint>{_EXPLAINED.get(report.metric, _EXPLAINED['plain'])}</p>"
        + _format_rounding(run)
        + _format_groups(report)
        + format_missing_files(run)
    )


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


def format_run_list(runs: Sequence[Run], problems: Iterable[str]) -> str:
    """Returns the table of runs, and a message for each that cannot be read."""
    messages = "".join(format_message("bad", problem) for problem in problems)
    if not runs:
        return messages + format_message("info", "There are no runs yet.")
    head = (
        "Run",
        "Created",
        "Checkpoints",
        "Ranks",
        "LoRAs",
        "Explained, mean",
        "Explained, worst",
    )
    return messages + format_table(head, [_run_row(run) for run in runs], numeric=(2, 4, 5, 6))


def format_run_comparison(first: Run, second: Run) -> str:
    """Returns two runs side by side: settings, sizes and explained shares."""
    facts: list[tuple[str, ...]] = [
        ("Checkpoints", str(len(first.report.checkpoints)), str(len(second.report.checkpoints))),
        ("Ranks", _ranks(first), _ranks(second)),
        ("LoRAs", format_size(first.report.bytes_loras), format_size(second.report.bytes_loras)),
        ("Hyper-model", first.hyper_model.name, second.hyper_model.name),
        ("Precision", first.recipe.dtype, second.recipe.dtype),
        ("Precision of the LoRAs", first.recipe.factors_dtype, second.recipe.factors_dtype),
        (
            "Explained, mean",
            format_percent(first.report.fidelity_mean),
            format_percent(second.report.fidelity_mean),
        ),
    ]
    explained = [
        {row.name: row.fidelity for row in run.report.checkpoints} for run in (first, second)
    ]
    rows = [tuple(_text(cell) for cell in fact) for fact in facts]
    names = list(dict.fromkeys([*explained[0], *explained[1]]))
    for name, cell in zip(names, format_names(names), strict=True):
        shares = [
            format_percent(by_name[name]) if name in by_name else "not included"
            for by_name in explained
        ]
        rows.append((f"Explained, {cell}", *shares))
    return format_table(("", first.name, second.name), rows, numeric=(1, 2))


def format_file_list(paths: Sequence[Path], question: str) -> str:
    """Returns files with their folders, below a question."""
    items = "".join(f"<li><code>{_text(str(path))}</code></li>" for path in paths)
    return f'<div class="hm-message hm-info">{_text(question)}<ul>{items}</ul></div>'


def _result_row(name: str, row: CheckpointReport) -> tuple[str, ...]:
    shares = (row.fidelity, row.explained, row.explained_unet, row.explained_text_encoder)
    return (name, *(format_percent(share) for share in shares), *_multipliers(row))


def _multipliers(row: CheckpointReport) -> list[str]:
    if not row.text_multipliers:
        return [f"{x:.3f}" for x in row.multipliers]
    pairs = zip(row.text_multipliers, row.multipliers, strict=True)
    return [f"{text:.2f} : {unet:.2f}" for text, unet in pairs]


def _run_row(run: Run) -> tuple[str, ...]:
    report = run.report
    gone = " <span class=hm-problem>files are missing</span>" if run.missing else ""
    return (
        _text(run.name) + gone,
        _text(_local_time(run.created)),
        str(len(report.checkpoints)),
        _text(_ranks(run)),
        format_size(report.bytes_loras),
        format_percent(report.fidelity_mean),
        format_percent(report.worst.fidelity),
    )


def _ranks(run: Run) -> str:
    """Returns the ranks of a run's LoRAs, and the size or share that they were chosen for."""
    ranks = ", ".join(map(str, run.recipe.ranks))
    return f"{ranks} for {format_requested_size(run.recipe)}" if run.recipe.finds_ranks else ranks


def _local_time(created: str) -> str:
    return datetime.fromisoformat(created).astimezone().strftime("%Y-%m-%d %H:%M")


def _text(text: str) -> str:
    return html.escape(text)
