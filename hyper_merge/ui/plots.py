"""A report's figures as pictures, legible on light and dark ground; no files, no global state."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import Final

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hyper_merge.report import Report

# Each of these stands out from white and from near-black by 3 to 1 at least; the pairs are told
# apart by colour-blind eyes too.
_GREY: Final = "#828282"
_STRONG: Final = "#0079bd"
_COLOURS: Final = ("#0079bd", "#d55e00", "#009e73", "#b3669a", "#8a7a20", "#6a76c4")
_WORST: Final = "#d55e00"
_PALE: Final = "#5e97c9"
_NEUTRAL: Final = "#d0d4d8"
_SIMILAR: Final = LinearSegmentedColormap.from_list(
    "similar", ("#b35806", "#e8a45c", _NEUTRAL, "#6baed6", "#08599c")
)
_DARK_INK, _LIGHT_INK = "#16191d", "#ffffff"

_WIDTH: Final = 7.0  # inches
_DPI: Final = 144
_LONGEST: Final = 30  # characters of a name
_NUMBERED_CELLS: Final = 12  # checkpoints, up to which a cell has room for its number
_TICKS: Final = 40  # that fit side by side
_LABEL_GAP: Final = 0.055  # between labels of lines, as a part of the axis
# Beside matplotlib's own, for names that it lacks the letters of.
_FONTS: Final = ("Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC", "WenQuanYi Micro Hei")


def explained_plot(report: Report) -> Figure:
    """Each checkpoint's explained share with the first 0, 1, ... LoRAs, multipliers fitted to those.

    Beyond six checkpoints, all are thin lines, of which the best and the worst are named.
    """
    figure, axes = _figure("Explained share as LoRAs are added", height=4.2)
    if not report.curve:
        return _without_figures(axes)
    lines = [list(line) for line in zip(*report.curve, strict=True)]
    names = [row.name for row in report.checkpoints]
    last = len(report.curve) - 1
    labels = _lines(axes, lines, names)
    heights = _spread([height for height, _, _ in labels])
    for (height, label, colour), place in zip(labels, heights, strict=True):
        _name_line(axes, (last, height, place), label, colour)
    axes.set_xlim(0, last)
    axes.set_ylim(0, 1)
    axes.set_xticks(range(last + 1))
    axes.set_xlabel("number of LoRAs, in their order (0: the average alone)", color=_GREY)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", color=_GREY, alpha=0.25, linewidth=0.8)
    return figure


def similarity_plot(report: Report) -> Figure:
    """Cosines of the checkpoints' deviations: 1 the same direction, 0 unrelated, -1 opposite."""
    k = len(report.checkpoints)
    figure, axes = _figure("Similarity of the checkpoints' differences from the base", _side(k))
    if not report.similarity:
        return _without_figures(axes)
    rows = [
        [float("nan") if r == c else value for c, value in enumerate(row)]
        for r, row in enumerate(report.similarity)
    ]
    axes.imshow(rows, cmap=_SIMILAR, vmin=-1, vmax=1)
    axes.set_anchor("W")
    axes.set_xticks(range(k), [str(number + 1) for number in range(k)])
    names = [f"{_short(row.name)}   {r + 1}" for r, row in enumerate(report.checkpoints)]
    axes.set_yticks(range(k), names, family=_families())
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if k <= _NUMBERED_CELLS:
        _number_cells(axes, rows)
    figure.supxlabel(
        "blue: the same direction (+1)    grey: unrelated (0)    orange: opposite (-1)",
        color=_GREY,
        fontsize=9,
        x=0.01,
        ha="left",
    )
    return figure


def parts_plot(report: Report) -> Figure:
    """How much of all differences lies in each section of the network, and how much is lost there."""
    figure, axes = _figure("Differences by section of the network", height=3.6)
    if not report.parts:
        return _without_figures(axes)
    split = [_split(part.name) for part in report.parts]
    places = _places(
        [(part.which, word) for part, (word, _) in zip(report.parts, split, strict=True)]
    )
    axes.bar(places, [p.energy for p in report.parts], color=_PALE, width=0.8)
    axes.bar(places, [p.lost for p in report.parts], color=_WORST, width=0.8)
    step = -(-len(places) // _TICKS)
    axes.set_xticks(
        places, [n if i % step == 0 else "" for i, (_, n) in enumerate(split)], fontsize=8
    )
    axes.set_xlim(-0.8, places[-1] + 0.8)
    _name_groups(axes, places, [word for word, _ in split])
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share * 100:g}%")
    axes.grid(axis="y", color=_GREY, alpha=0.25, linewidth=0.8)
    axes.set_axisbelow(True)
    words = ["all differences in the layers", "what is lost of them"]
    figure.legend(
        words, loc="outside lower left", frameon=False, labelcolor=_GREY, fontsize=9, ncols=2
    )
    return figure


def _figure(title: str, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="none")
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    axes = figure.add_subplot(facecolor="none")
    figure.suptitle(title, x=0.01, ha="left", color=_GREY, fontsize=11, fontweight="bold")
    axes.tick_params(colors=_GREY, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(_GREY)
    return figure, axes


def _without_figures(axes: Axes) -> Figure:
    """A note in place of the plot."""
    axes.set_axis_off()
    note = "not in this report, which an earlier version of Hyper-Merge wrote"
    axes.text(0.5, 0.5, note, color=_GREY, ha="center", va="center", transform=axes.transAxes)
    figure = axes.figure
    assert isinstance(figure, Figure)
    return figure


def _lines(
    axes: Axes,
    lines: Sequence[Sequence[float]],  # k of R + 1
    names: Sequence[str],
) -> list[tuple[float, str, str]]:  # where each named line ends, its label, its colour
    ends = [line[-1] for line in lines]
    if len(lines) <= len(_COLOURS):
        shown = dict(zip(range(len(lines)), _COLOURS, strict=False))
    else:
        shown = {ends.index(max(ends)): _STRONG, ends.index(min(ends)): _WORST}
    for index, line in enumerate(lines):
        colour, width = shown.get(index, _GREY), 2.0 if index in shown else 0.8
        marker = "o" if index in shown else None
        axes.plot(line, color=colour, linewidth=width, marker=marker, markersize=4, clip_on=False)
    words = [f"{end:.1%}  {_short(name)}" for end, name in zip(ends, names, strict=True)]
    return [(ends[index], words[index], colour) for index, colour in shown.items()]


def _name_line(axes: Axes, point: tuple[float, float, float], label: str, colour: str) -> None:
    """A label right of a line's end, level with it or with a thin line to where there was room."""
    last, height, place = point
    axes.annotate(
        label,
        xy=(last, height),
        xytext=(1.03, place),
        textcoords=axes.get_yaxis_transform(),
        color=colour,
        fontsize=9,
        va="center",
        family=_families(),
        arrowprops={
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.6,
            "shrinkA": 2,
            "shrinkB": 4,
            "relpos": (0, 0.5),  # from the middle of the label's left side
        },
        annotation_clip=False,
    )


def _spread(heights: Sequence[float]) -> list[float]:
    """Places near the heights, in their order, of which no two are nearer than a label's height."""
    order = sorted(range(len(heights)), key=lambda i: heights[i], reverse=True)
    places: list[float] = []
    for index in order:
        highest = places[-1] - _LABEL_GAP if places else 1.0
        places.append(min(heights[index], highest))
    lowest = 0.0
    for position in reversed(range(len(places))):
        places[position] = max(places[position], lowest)
        lowest = places[position] + _LABEL_GAP
    return [place for _, place in sorted(zip(order, places, strict=True))]


def _side(k: int) -> float:  # inches
    """Height of a matrix of k rows."""
    return min(max(1.1 + 0.45 * k, 2.4), 5.7)


def _number_cells(axes: Axes, rows: Sequence[Sequence[float]]) -> None:
    for r, row in enumerate(rows):
        for c, value in enumerate(row):
            if r != c:
                ink = _LIGHT_INK if abs(value) > 0.75 else _DARK_INK
                axes.text(c, r, f"{value:+.2f}", color=ink, ha="center", va="center", fontsize=8)


def _split(name: str) -> tuple[str, str]:
    """Word and number of a section: IN and 04, TE2 and 11."""
    match = re.fullmatch(r"(.*?)\W*(\d*)", name)
    assert match is not None
    return match[1], match[2]


def _places(groups: Sequence[tuple[str, str]]) -> list[float]:
    """One place after the other, with a gap before each new group."""
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
            color=_GREY,
            fontsize=9,
            ha="center",
            va="top",
            annotation_clip=False,
        )


def _short(name: str) -> str:
    """The name, without its middle where it is too long; a box for a letter that no font has.

    Two dollar signs would make a formula of it for matplotlib.
    """
    if len(name) > _LONGEST:
        half = (_LONGEST - 1) // 2
        name = f"{name[:half]}…{name[-half:]}"
    letters = _letters()
    shown = "".join(letter if ord(letter) in letters else "□" for letter in name)
    return shown.replace("$", r"\$")


@cache
def _families() -> tuple[str, ...]:
    known = set(fontManager.get_font_names())
    return ("DejaVu Sans", *(name for name in _FONTS if name in known))


@cache
def _letters() -> frozenset[int]:
    """Code points that some font has: matplotlib warns of each that none has."""
    fonts = (FT2Font(findfont(FontProperties(family=name))) for name in _families())
    return frozenset(code for font in fonts for code in font.get_charmap())
