"""What all plots are drawn on: a transparent page, colours for any ground, labels that stay apart."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font

# Each of these stands out from white and from near-black by 3 to 1 at least; the pairs are told
# apart by colour-blind eyes too.
GREY: Final = "#828282"
STRONG: Final = "#0079bd"
COLOURS: Final = ("#0079bd", "#d55e00", "#009e73", "#b3669a", "#8a7a20", "#6a76c4")
WORST: Final = "#d55e00"
PALE: Final = "#5e97c9"
LABEL_GAP: Final = 0.055  # between labels of lines, as a part of the axis

_WIDTH: Final = 7.0  # inches
_DPI: Final = 144
_LONGEST: Final = 30  # characters of a name
# Beside matplotlib's own, for names that it lacks the letters of.
_FONTS: Final = ("Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC", "WenQuanYi Micro Hei")


def new_figure(title: str, height: float) -> tuple[Figure, Axes]:
    """An empty page with a title, and its axes; height in inches."""
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="none")
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    axes = figure.add_subplot(facecolor="none")
    figure.suptitle(title, x=0.01, ha="left", color=GREY, fontsize=11, fontweight="bold")
    axes.tick_params(colors=GREY, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(GREY)
    return figure, axes


def name_line(axes: Axes, point: tuple[float, float, float], label: str, colour: str) -> None:
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
    """Places near the heights, in their order, of which no two are nearer than a label's height."""
    order = sorted(range(len(heights)), key=lambda i: heights[i], reverse=True)
    places: list[float] = []
    for index in order:
        highest = places[-1] - LABEL_GAP if places else 1.0
        places.append(min(heights[index], highest))
    lowest = 0.0
    for position in reversed(range(len(places))):
        places[position] = max(places[position], lowest)
        lowest = places[position] + LABEL_GAP
    return [place for _, place in sorted(zip(order, places, strict=True))]


def shorten_name(name: str) -> str:
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
def font_families() -> tuple[str, ...]:
    """Fonts for names, in the order in which a letter is looked for."""
    known = set(fontManager.get_font_names())
    return ("DejaVu Sans", *(name for name in _FONTS if name in known))


@cache
def _letters() -> frozenset[int]:
    """Code points that some font has: matplotlib warns of each that none has."""
    fonts = (FT2Font(findfont(FontProperties(family=name))) for name in font_families())
    return frozenset(code for font in fonts for code in font.get_charmap())
