"""Formats the HTML of the tab "Compare"; every name is escaped."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Final

from hyper_merge.operations.compare.image_difference import LEVELS
from hyper_merge.operations.compare.records import ComparisonRecord
from hyper_merge.ui.html.common import format_hint, format_message, format_table
from hyper_merge.ui.html.names import format_names

_ROW_TITLES: Final = {"restored": "Hyper-model + LoRAs", "average": "Hyper-model alone"}


def format_compare_introduction() -> str:
    """Returns the text that is shown until there are pictures."""
    return (
        "<div class=hm-intro><h3>Compare pictures</h3>"
        "<p>Draws the same prompt, seed and settings twice: with the hyper-model and a checkpoint's "
        "LoRAs, and with the original checkpoint. The table shows how much the two differ.</p></div>"
    )


def format_comparison(record: ComparisonRecord, path: Path, source: str) -> str:
    """Returns a comparison: its figures and its grid.

    Args:
        record: the figures.
        path: of the grid's file.
        source: the grid as a URL.
    """
    notes = "".join(format_message("info", note) for note in record.notes)
    pairs = sum(bool(figure.pixels) for figure in record.figures)
    title = html.escape(f"{record.run}: {pairs} pairs, drawn by {record.host}")
    return (
        f"<p><b>{html.escape(record.name)}</b> of {title}.</p>{notes}"
        + (_format_differences(record) if pairs else "")
        + f'<img class=hm-grid src="{source}" alt="{title}">'
        + format_hint(f"Saved with its parameters: {path}")
    )


def _format_differences(record: ComparisonRecord) -> str:
    """Returns the means over prompts and seeds, one row per checkpoint."""
    rows = [row for row in _ROW_TITLES if any(row in figure.pixels for figure in record.figures)]
    head = ["Checkpoint", *(_ROW_TITLES[row] for row in rows)]
    if record.measure:
        head += [f"{_ROW_TITLES[row]}, {record.measure}" for row in rows]
    names = [name for name in record.tags if any(_differences(record, name, row) for row in rows)]
    body = []
    for name, cell in zip(names, format_names(names), strict=True):
        cells = [cell]
        cells += [_format_pixels(_differences(record, name, row)) for row in rows]
        if record.measure:
            shares = [_differences(record, name, row, perceptual=True) for row in rows]
            cells += [f"{_mean(values):.3f}" for values in shares]
        body.append(cells)
    hint = f"Mean difference from the original's pictures, on a scale of 0 (equal) to {LEVELS}."
    if record.measure:
        hint += f" {record.measure}: 0 where pictures look the same."
    return format_hint(hint) + format_table(head, body, numeric=range(1, len(head)))


def _differences(
    record: ComparisonRecord, name: str, row: str, *, perceptual: bool = False
) -> list[float]:
    """Returns a checkpoint's differences in a row of the grid, one per prompt and seed."""
    figures = [figure for figure in record.figures if figure.checkpoint == name]
    maps = [figure.perceptual if perceptual else figure.pixels for figure in figures]
    return [by_row[row] for by_row in maps if row in by_row]


def _format_pixels(values: list[float]) -> str:
    return f"{_mean(values):.2f} ({_mean(values) / LEVELS:.1%})" if values else ""


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
