"""What the tab says of pictures, as HTML; every name is escaped."""

from __future__ import annotations

import html
from pathlib import Path

from hyper_merge.operations.compare.image_difference import LEVELS
from hyper_merge.operations.compare.records import ComparisonRecord
from hyper_merge.ui.html.common import format_hint, format_message, format_table


def format_compare_introduction() -> str:
    """What stands where the pictures will be."""
    return (
        "<div class=hm-intro><h3>See what comes back</h3>"
        "<p>The same prompt, seed and settings twice: by the hyper-model with a checkpoint's LoRAs, "
        "and by the original checkpoint. Below each pair stands how far the two are apart.</p></div>"
    )


def format_comparison(found: ComparisonRecord, path: Path, source: str) -> str:
    """A comparison.

    Args:
        found: its figures.
        path: of the grid.
        source: the grid as a URL.
    """
    notes = "".join(format_message("info", note) for note in found.notes)
    pairs = sum(bool(each.pixels) for each in found.figures)
    words = html.escape(f"{found.run}: {pairs} pairs, drawn by {found.host}")
    return (
        f"<p><b>{html.escape(found.name)}</b> of {words}.</p>{notes}"
        + (_table(found) if pairs else "")
        + f'<img class=hm-grid src="{source}" alt="{words}">'
        + format_hint(f"Saved with its parameters: {path}")
    )


def _table(found: ComparisonRecord) -> str:
    """Means over prompts and seeds, one row per checkpoint."""
    rows = [
        each for each in ("restored", "average") if any(each in x.pixels for x in found.figures)
    ]
    titles = {"restored": "Hyper-model + LoRAs", "average": "Hyper-model alone"}
    head = ["Checkpoint", *(titles[row] for row in rows)]
    if found.measure:
        head += [f"{titles[row]}, {found.measure}" for row in rows]
    names = [name for name in found.tags if any(_of(found, name, row) for row in rows)]
    body = []
    for name in names:
        cells = [html.escape(name), *(_pixels(_of(found, name, row)) for row in rows)]
        if found.measure:
            cells += [f"{_mean(_of(found, name, row, seen=True)):.3f}" for row in rows]
        body.append(cells)
    return format_hint(
        f"Mean difference from the original's pictures, in levels of {LEVELS}; 0 is equal."
    ) + format_table(head, body, numeric=range(1, len(head)))


def _of(found: ComparisonRecord, name: str, row: str, *, seen: bool = False) -> list[float]:
    figures = [each for each in found.figures if each.checkpoint == name]
    maps = [each.perceptual if seen else each.pixels for each in figures]
    return [each[row] for each in maps if row in each]


def _pixels(values: list[float]) -> str:
    return f"{_mean(values):.2f} ({_mean(values) / LEVELS:.1%})" if values else ""


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
