"""Formats the HTML of the tab "Runs": the list, two runs side by side; every name is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from hyper_merge.runs.run import Run
from hyper_merge.runtime.formatting import format_count, format_size
from hyper_merge.ui.form import format_requested_size
from hyper_merge.ui.html.common import (
    format_message,
    format_percent,
    format_table,
)
from hyper_merge.ui.html.names import format_names


def format_run_list(runs: Sequence[Run], problems: Iterable[str]) -> str:
    """Returns the table of runs, whose rows can be picked, and a message for each that cannot be read.

    The script shows the hint below the table when a search finds none.
    """
    messages = "".join(format_message("bad", problem) for problem in problems)
    if not runs:
        return messages + format_message("info", "There are no runs yet.")
    head = (
        "Run",
        "Created",
        "Made of",
        "Ranks",
        "LoRAs",
        "Explained, mean",
        "Explained, worst",
    )
    table = format_table(
        head,
        [_run_row(run) for run in runs],
        numeric=(4, 5, 6),
        attributes=[_row_attributes(run) for run in runs],
    )
    return messages + table + "<p class=hm-hint hidden>No run has all of these words.</p>"


def format_run_comparison(first: Run, second: Run) -> str:
    """Returns two runs side by side: settings, sizes and explained shares."""
    facts: list[tuple[str, ...]] = [
        ("Made of", *(format_count(len(x.report.checkpoints), _kind(x)) for x in (first, second))),
        ("Ranks", _ranks(first), _ranks(second)),
        ("LoRAs", format_size(first.report.bytes_loras), format_size(second.report.bytes_loras)),
        ("Hyper-model", *(x.hyper_model.name or "none" for x in (first, second))),
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


def _row_attributes(run: Run) -> str:
    """Returns a row's attributes for the script: the run, and words by which it is found."""
    words = " ".join([run.family, *(row.name for row in run.report.checkpoints)])
    kind = "loras" if run.of_loras else "checkpoints"
    return f'data-run="{_text(run.name)}" data-kind={kind} data-words="{_text(words)}" title="{_text(words)}"'


def _run_row(run: Run) -> tuple[str, ...]:
    report = run.report
    gone = " <span class=hm-problem>files are missing</span>" if run.missing else ""
    return (
        f"<button type=button aria-pressed=false>{_text(run.name)}</button>{gone}",
        _text(_local_time(run.created)),
        format_count(len(report.checkpoints), _kind(run)),
        _text(_ranks(run)),
        format_size(report.bytes_loras),
        format_percent(report.fidelity_mean),
        format_percent(report.worst.fidelity),
    )


def _kind(run: Run) -> str:
    return "LoRA" if run.of_loras else "checkpoint"


def _ranks(run: Run) -> str:
    """Returns the ranks of a run's LoRAs, and the size or share that they were chosen for."""
    ranks = ", ".join(map(str, run.recipe.ranks))
    return f"{ranks} for {format_requested_size(run.recipe)}" if run.recipe.finds_ranks else ranks


def _local_time(created: str) -> str:
    return datetime.fromisoformat(created).astimezone().strftime("%Y-%m-%d %H:%M")


def _text(text: str) -> str:
    return html.escape(text)
