"""Draws the common parts of all plots: a transparent page, colours, labels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font

# For letters and lines on white: 4.5 to 1 at least. The style sheet turns light and dark around in a dark
# theme, and keeps the hues. Colour-blind eyes can distinguish the pairs too.
GREY: Final = "#4b5563"
STRONG: Final = "#0070b0"
COLOURS: Final = ("#0070b0", "#b34e00", "#00785a", "#99487f", "#6f621a", "#5560b0")
# For surfaces: 3 to 1.
WORST: Final = "#d55e00"
PALE: Final = "#5e97c9"
LABEL_GAP: Final = 0.055  # between labels of lines, as a part of the axis

_WIDTH: Final = 7.0  # inches
_DPI: Final = 144
_LONGEST: Final = 30  # characters of a name
# In addition to matplotlib's own font, for names with letters that it lacks.
_FONTS: Final = ("Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC", "WenQuanYi Micro Hei")


def new_figure(title: str, height: float) -> tuple[Figure, Axes]:
    """Returns an empty page with a title, and its axes; `height` in inches."""
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="none")
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    axes = figure.add_subplot(facecolor="none")
    figure.suptitle(title, x=0.01, ha="left", color=GREY, fontsize=11, fontweight="bold")
    axes.tick_params(colors=GREY, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(GREY)
    return figure, axes


def draw_png(figure: Figure) -> bytes:
    """Returns a page as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def name_line(axes: Axes, x: float, y: float, label_y: float, label: str, colour: str) -> None:
    """Puts a label right of a line's end, connected by a thin line where it is not level with it.

    Args:
        axes: where to draw.
        x: of the line's end.
        y: of the line's end.
        label_y: height of the label, as a part of the axis.
        label: its text.
        colour: of label and line.
    """
    axes.annotate(
        label,
        xy=(x, y),
        xytext=(1.03, label_y),
        textcoords=axes.get_yaxis_transform(),
        color=colour,
        fontsize=9,
        va="center",
        family=font_families(),
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


def spread_labels(heights: Sequence[float]) -> list[float]:
    """Returns places near the heights, in their order, at least a label's height apart."""
    by_height = sorted(range(len(heights)), key=lambda i: heights[i], reverse=True)
    places: list[float] = []
    for index in by_height:
        highest = places[-1] - LABEL_GAP if places else 1.0
        places.append(min(heights[index], highest))
    lowest = 0.0
    for position in reversed(range(len(places))):
        places[position] = max(places[position], lowest)
        lowest = places[position] + LABEL_GAP
    return [place for _, place in sorted(zip(by_height, places, strict=True))]


def shorten_name(name: str) -> str:
    """Returns a name without its middle if it is too long, with a box for letters that no font has.

    Dollar signs are escaped, since matplotlib takes text between two of them for a formula.
    """
    if len(name) > _LONGEST:
        half = (_LONGEST - 1) // 2
        name = f"{name[:half]}…{name[-half:]}"
    letters = _letters()
    printable = "".join(letter if ord(letter) in letters else "□" for letter in name)
    return printable.replace("$", r"\$")


@cache
def font_families() -> tuple[str, ...]:
    """Returns fonts for names, in the order in which they are searched for a letter."""
    installed = set(fontManager.get_font_names())
    return ("DejaVu Sans", *(name for name in _FONTS if name in installed))


@cache
def _letters() -> frozenset[int]:
    """Returns the code points of all fonts; matplotlib warns of each that none of them has."""
    fonts = (FT2Font(findfont(FontProperties(family=name))) for name in font_families())
    return frozenset(code for font in fonts for code in font.get_charmap())
