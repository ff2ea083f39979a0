"""Plots a report, legible on light and dark backgrounds; no files, no global state."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Final

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hyper_merge.runs.report import Report
from hyper_merge.ui.plots.canvas import (
    COLOURS,
    GREY,
    PALE,
    STRONG,
    WORST,
    font_families,
    name_line,
    new_figure,
    shorten_name,
    spread_labels,
)

_NEUTRAL: Final = "#d0d4d8"
_SIMILAR: Final = LinearSegmentedColormap.from_list(
    "similar", ("#b35806", "#e8a45c", _NEUTRAL, "#6baed6", "#08599c")
)
_DARK_INK, _LIGHT_INK = "#16191d", "#ffffff"

_NUMBERED_CELLS: Final = 12  # checkpoints, up to which a cell has room for its number
_TICKS: Final = 40  # that fit side by side


def explained_plot(report: Report, *, of_loras: bool = False) -> Figure:
    """Draws each checkpoint's explained share with the first 0, 1, ... LoRAs, fitted to those.

    More than six checkpoints are thin lines, of which only the best and the worst are named.

    Args:
        report: of the run.
        of_loras: whether LoRAs were distilled: then there is no average.
    """
    figure, axes = new_figure("Explained in weights, by number of LoRAs", height=4.2)
    if not report.curve:
        return _without_figures(axes)
    lines = [list(line) for line in zip(*report.curve, strict=True)]
    names = [row.name for row in report.checkpoints]
    last = len(report.curve) - 1
    labels = _lines(axes, lines, names)
    heights = spread_labels([height for height, _, _ in labels])
    for (height, label, colour), place in zip(labels, heights, strict=True):
        name_line(axes, last, height, place, label, colour)
    axes.set_xlim(0, last)
    axes.set_ylim(0, 1)
    axes.set_xticks(range(last + 1))
    first = "none" if of_loras else "average alone"
    axes.set_xlabel(f"number of LoRAs, in their order (0: {first})", color=GREY)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.8)
    return figure


def similarity_plot(report: Report) -> Figure:
    """Draws the cosines of the checkpoints' deviations: 1 same direction, 0 unrelated, -1 opposite."""
    k = len(report.checkpoints)
    figure, axes = new_figure("Similarity of the checkpoints' differences from the base", _side(k))
    if not report.similarity:
        return _without_figures(axes)
    rows = report.similarity
    axes.imshow(rows, cmap=_SIMILAR, vmin=-1, vmax=1)
    axes.set_anchor("W")
    axes.set_xticks(range(k), [str(number + 1) for number in range(k)])
    names = [f"{shorten_name(row.name)}   {r + 1}" for r, row in enumerate(report.checkpoints)]
    axes.set_yticks(range(k), names, family=font_families())
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if k <= _NUMBERED_CELLS:
        _number_cells(axes, rows)
    figure.supxlabel(
        "blue: same direction (+1)    grey: unrelated (0)    orange: opposite (-1)",
        color=GREY,
        fontsize=9,
        x=0.01,
        ha="left",
    )
    return figure


def parts_plot(report: Report) -> Figure:
    """Draws the share of all differences in each section of the network, and what is lost of it."""
    figure, axes = new_figure("Differences in weights, by section of the network", height=3.6)
    if not report.parts:
        return _without_figures(axes)
    split = [_split(part.name) for part in report.parts]
    places = _places(
        [(part.which, word) for part, (word, _) in zip(report.parts, split, strict=True)]
    )
    axes.bar(places, [p.energy for p in report.parts], color=PALE, width=0.8)
    axes.bar(places, [p.lost for p in report.parts], color=WORST, width=0.8)
    step = -(-len(places) // _TICKS)
    axes.set_xticks(
        places, [n if i % step == 0 else "" for i, (_, n) in enumerate(split)], fontsize=8
    )
    axes.set_xlim(-0.8, places[-1] + 0.8)
    _name_groups(axes, places, [word for word, _ in split])
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share * 100:g}%")
    axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.8)
    axes.set_axisbelow(True)
    titles = ["all differences in the layers", "not explained"]
    figure.legend(
        titles, loc="outside lower left", frameon=False, labelcolor=GREY, fontsize=9, ncols=2
    )
    return figure


def _without_figures(axes: Axes) -> Figure:
    """Shows a note instead of the plot."""
    axes.set_axis_off()
    note = "not available: this report was written by an earlier version of Hyper-Merge"
    axes.text(0.5, 0.5, note, color=GREY, ha="center", va="center", transform=axes.transAxes)
    figure = axes.figure
    assert isinstance(figure, Figure)
    return figure


def _lines(
    axes: Axes,
    lines: Sequence[Sequence[float]],  # k of R + 1
    names: Sequence[str],
) -> list[tuple[float, str, str]]:  # where each named line ends, its label, its colour
    ends = [line[-1] for line in lines]
    if len(lines) <= len(COLOURS):
        named = dict(zip(range(len(lines)), COLOURS, strict=False))
    else:
        named = {ends.index(max(ends)): STRONG, ends.index(min(ends)): WORST}
    for index, line in enumerate(lines):
        colour, width = named.get(index, GREY), 2.0 if index in named else 0.8
        marker = "o" if index in named else None
        axes.plot(line, color=colour, linewidth=width, marker=marker, markersize=4, clip_on=False)
    labels = [f"{end:.1%}  {shorten_name(name)}" for end, name in zip(ends, names, strict=True)]
    return [(ends[index], labels[index], colour) for index, colour in named.items()]


def _side(k: int) -> float:  # inches
    """Returns the height of a matrix of k rows."""
    return min(max(1.1 + 0.45 * k, 2.4), 5.7)


def _number_cells(axes: Axes, rows: Sequence[Sequence[float]]) -> None:
    for r, row in enumerate(rows):
        for c, value in enumerate(row):
            ink = _LIGHT_INK if abs(value) > 0.75 else _DARK_INK
            text = f"{value:+.2f}" if r != c else "1"  # each with itself
            axes.text(c, r, text, color=ink, ha="center", va="center", fontsize=8)


def _split(name: str) -> tuple[str, str]:
    """Splits a section's name into word and number: IN and 04, TE2 and 11."""
    match = re.fullmatch(r"(.*?)\W*(\d*)", name)
    assert match is not None
    return match[1], match[2]


def _places(groups: Sequence[tuple[str, str]]) -> list[float]:
    """Returns one place after the other, with a gap before each new group."""
    places, place = [], 0.0
    for index, group in enumerate(groups):
        place += 1.0 if index and group == groups[index - 1] else 1.8 if index else 0.0
        places.append(place)
    return places


def _name_groups(axes: Axes, places: Sequence[float], words: Sequence[str]) -> None:
    for word, members in groupby(zip(words, places, strict=True), key=lambda pair: pair[0]):
        inside = [place for _, place in members]
        middle = (inside[0] + inside[-1]) / 2
        axes.annotate(
            word,
            xy=(middle, 0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, -20),
            textcoords="offset points",
            color=GREY,
            fontsize=9,
            ha="center",
            va="top",
            annotation_clip=False,
        )
