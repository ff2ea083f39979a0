"""Plots the forecast: the share that LoRAs of each size would explain; no files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, PercentFormatter

from hyper_merge.operations.merge.plan import ForecastCurve
from hyper_merge.runtime.formatting import format_size
from hyper_merge.ui.plots.canvas import GREY, STRONG, WORST, name_line, new_figure, spread_labels

_FEWEST: Final = 2  # powers of two between ticks, where all would not fit side by side
_FIT: Final = 8  # ticks side by side
_MB: Final = 10**6


def forecast_plot(forecast: ForecastCurve, size: int | None) -> Figure:
    """Draws explained shares by the size of all LoRAs: their mean, and that of the worst checkpoint.

    Args:
        forecast: the curve.
        size: bytes of the LoRAs that the form describes, marked; None for no mark.
    """
    figure, axes = new_figure("Forecast: explained share by total size of the LoRAs", height=3.8)
    ends = [
        _draw(axes, forecast.sizes, rows, name, colour)
        for name, rows, colour in (
            ("shared LoRAs", forecast.shared, STRONG),
            ("private LoRAs", forecast.private, WORST),
        )
    ]
    axes.axhline(0, color=GREY, linewidth=2, clip_on=False)
    labels = [*ends[0], *ends[1], (0.0, "average alone", GREY)]
    places = spread_labels([height for height, *_ in labels])
    for (height, label, colour), place in zip(labels, places, strict=True):
        name_line(axes, forecast.sizes[-1], height, place, label, colour)
    _scale(axes, forecast.sizes)
    _mark(axes, forecast, size)
    return figure


def _draw(
    axes: Axes,
    sizes: Sequence[int],
    rows: Sequence[Sequence[float]],  # (sizes, k)
    name: str,  # of the kind of LoRAs
    colour: str,
) -> list[tuple[float, str, str]]:  # where each line ends, its label, its colour
    mean = [sum(row) / len(row) for row in rows]
    worst = [min(row) for row in rows]
    axes.plot(sizes, mean, color=colour, linewidth=2)
    axes.plot(sizes, worst, color=colour, linewidth=1.2, linestyle=(0, (4, 2)))
    return [(mean[-1], f"{name}, mean", colour), (worst[-1], f"{name}, worst", colour)]


def _scale(axes: Axes, sizes: Sequence[int]) -> None:
    """Scales the axis of sizes by powers of two, with a tick for every one, or for some."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(sizes[0], sizes[-1])
    axes.set_ylim(0, 1)
    powers = [p for p in range(-10, 24) if sizes[0] <= 2.0**p * _MB <= sizes[-1]]
    ticks = [2.0**p for p in powers if len(powers) <= _FIT or p % _FEWEST == 0]
    axes.xaxis.set_major_locator(FixedLocator([tick * _MB for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda size, _: f"{round(size / _MB, 3):g}")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("total size of the LoRAs, MB", color=GREY)
    axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.8)


def _mark(axes: Axes, forecast: ForecastCurve, size: int | None) -> None:
    """Marks a size by a line, with its figures above the plot."""
    if size is None:
        return
    shares = forecast.at(size)
    mean, worst = sum(shares) / len(shares), min(shares)
    place = min(max(size, forecast.sizes[0]), forecast.sizes[-1])
    axes.axvline(place, color=GREY, linewidth=1.2)
    axes.plot([place, place], [mean, worst], "o", color=STRONG, markersize=6, clip_on=False)
    text = (
        f"{format_size(size)}: about {mean:.1%} as the mean over checkpoints, {worst:.1%} at worst"
    )
    axes.set_title(text, loc="left", color=GREY, fontsize=9)
