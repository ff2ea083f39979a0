"""Describes the plots of a report in words, for screen readers."""

from __future__ import annotations

from itertools import combinations
from typing import Final

from hyper_merge.runs.report import Report
from hyper_merge.ui.html.common import format_percent

_NONE: Final = "The report has no figures for this plot."
_MOST: Final = 6  # checkpoints or sections that are named


def describe_explained(report: Report) -> str:
    """Returns what `explained_plot` shows: the share that all LoRAs explain, by checkpoint."""
    if not report.curve:
        return _NONE
    ends = sorted(
        zip(report.curve[-1], (row.name for row in report.checkpoints), strict=True), reverse=True
    )
    named = ends if len(ends) <= _MOST else [ends[0], ends[-1]]
    shares = ", ".join(f"{name} {format_percent(share)}" for share, name in named)
    which = "" if len(named) == len(ends) else "from the best to the worst: "
    return (
        f"Lines that rise with the number of LoRAs. Explained in weights by all"
        f" {len(report.curve) - 1}: {which}{shares}."
    )


def describe_similarity(report: Report) -> str:
    """Returns what `similarity_plot` shows: the pairs that are the most and the least alike."""
    pairs = list(combinations(range(len(report.checkpoints)), 2))
    if not report.similarity or not pairs:
        return _NONE
    by_cosine = sorted(pairs, key=lambda pair: report.similarity[pair[0]][pair[1]])

    def words(pair: tuple[int, int]) -> str:
        one, other = (report.checkpoints[place].name for place in pair)
        return f"{one} and {other} ({report.similarity[pair[0]][pair[1]]:+.2f})"

    return (
        "A table of colours: how similar the checkpoints' differences from the base are, from -1 to"
        f" +1. The most similar: {words(by_cosine[-1])}; the least: {words(by_cosine[0])}."
    )


def describe_parts(report: Report) -> str:
    """Returns what `parts_plot` shows: the sections of the network with most differences."""
    if not report.parts:
        return _NONE
    largest = sorted(report.parts, key=lambda part: -part.energy)[:_MOST]
    shares = ", ".join(
        f"{part.name} {format_percent(part.energy)}, of it not explained {format_percent(part.lost)}"
        for part in largest
    )
    return f"Bars of the differences in weights by section of the network. The largest: {shares}."
