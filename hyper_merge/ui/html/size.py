"""Formats the choice of a size: its three fields, and the curve of what every size would explain.

The script `hyper_merge_size.js` fills the fields, and puts the curve below a slider of its own.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Final

from hyper_merge.operations.merge.plan import ForecastCurve
from hyper_merge.runtime.formatting import format_duration
from hyper_merge.ui.element_ids import elem_id

_WIDTH: Final = 1000  # of the drawing, which is stretched to that of the page
_LEVELS: Final = (0, 20, 40, 60, 80, 100)  # percent
_MOST_TICKS: Final = 6
_SHORT: Final = 90  # seconds
_UNITS: Final = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
_FIELDS: Final = (
    ("ranks", "Ranks", "One LoRA per number, such as 64, 48, 32; higher ones come closer"),
    ("size", "Total size", "Of all LoRAs, such as 300 MB"),
    ("share", "Share, at worst", "Of what sets a checkpoint apart, such as 95 %"),
)
_LEGEND: Final = (
    ("hm-shared", "shared LoRAs, mean"),
    ("hm-shared hm-dashed", "at worst"),
    ("hm-private", "a LoRA for each checkpoint alone, of the same total size"),
)


def format_size_fields() -> str:
    """Returns the fields, and the place of curve and slider, which are hidden until there is a curve."""
    fields = "".join(
        f"<label class=hm-field><span>{label}</span><small id={elem_id(f'{kind}_hint')}>{hint}</small>"
        f'<input type=text data-size="{kind}" aria-label="{label}" autocomplete=off spellcheck=false'
        f" aria-describedby={elem_id(f'{kind}_hint')}></label>"
        for kind, label, hint in _FIELDS
    )
    legend = "".join(
        f"<span><i class='{line}'></i>{html.escape(text)}</span>" for line, text in _LEGEND
    )
    return (
        '<div class=hm-size role=group aria-label="Size of the LoRAs">'
        "<div class=hm-chart hidden><p class=hm-readout></p><div class=hm-area>"
        "<div class=hm-lines></div><div class=hm-mark hidden><b></b><b></b></div>"
        '<input type=range min=0 step=0.25 aria-label="Size of the LoRAs"></div>'
        f"<p class=hm-legend>{legend}<span>Drag on the curve to choose a size.</span></p></div>"
        f"<div class=hm-fields>{fields}</div>"
        "<p class=hm-hint>Fill in one of them, or choose a size for as many LoRAs as checkpoints:</p></div>"
    )


def format_size_choice(
    text: str,
    forecast: ForecastCurve | None,
    size: int | None,
    asked: Sequence[int] | None,
) -> str:
    """Returns what the script needs, and the curve's drawing.

    Args:
        text: the form's ranks, size or share.
        forecast: the curve, if it is known.
        size: bytes of the LoRAs that the text asks for; None where they are not known.
        asked: ranks that the text asks for, perhaps by a word; None where the merge finds them.
    """
    known = {"text": text, "size": size, "asked": _join(asked or ())}
    if forecast is None:
        return f'<div class=hm-choice data-choice="{_json(known)}"></div>'
    worst = [min(range(len(row)), key=row.__getitem__) for row in forecast.shared]
    choice = {
        **known,
        "sizes": forecast.sizes,
        "mean": [round(x, 5) for x in _means(forecast.shared)],
        "worst": [round(min(row), 5) for row in forecast.shared],
        "names": [forecast.names[place] for place in worst],
        "ranks": list(map(_join, forecast.ranks)),
    }
    return (
        f'<div class=hm-choice data-choice="{_json(choice)}">{_format_lines(forecast)}'
        f"{_format_ticks(forecast.sizes)}</div>"
    )


def format_forecast_offer(seconds: float) -> str:
    """Returns the text of the button that looks at the files: a first step where that takes seconds."""
    see = "First see" if seconds < _SHORT else "See"
    return f"{see} what each size would explain ({format_duration(seconds)})"


def _format_lines(forecast: ForecastCurve) -> str:
    lines = (
        ("hm-private", _means(forecast.private)),
        ("hm-private hm-dashed", map(min, forecast.private)),
        ("hm-shared", _means(forecast.shared)),
        ("hm-shared hm-dashed", map(min, forecast.shared)),
    )
    drawn = "".join(f'<polyline class="{name}" points="{_points(row)}"/>' for name, row in lines)
    return (
        f'<svg viewBox="0 0 {_WIDTH} 100" preserveAspectRatio="none" aria-hidden="true">'
        f"{drawn}</svg>"
    )


def _format_ticks(sizes: Sequence[int]) -> str:
    levels = "".join(f"<u style='bottom:{level}%' data-level='{level} %'></u>" for level in _LEVELS)
    last = len(sizes) - 1
    ticks = "".join(
        f"<s style='left:{100 * place_of(sizes, tick) / last:.2f}%'>{_tick_text(tick)}</s>"
        for tick in size_ticks(sizes[0], sizes[-1])
    )
    return levels + ticks


def size_ticks(low: int, high: int) -> list[int]:
    """Returns round sizes between two, a few of them.

    >>> size_ticks(3_000_000, 400_000_000)
    [5000000, 10000000, 20000000, 50000000, 100000000, 200000000]
    """
    for steps in ((1, 2, 5), (1, 5), (1,)):
        ticks = [s * 10**e for e in range(13) for s in steps if low <= s * 10**e <= high]
        if len(ticks) <= _MOST_TICKS:
            break
    return ticks


def place_of(sizes: Sequence[int], size: int) -> float:
    """Returns the place of a size on an axis with the same distance between all sizes, from 0 on."""
    after = next((i for i, known in enumerate(sizes) if known > size), len(sizes))
    if after in (0, len(sizes)):
        return float(min(after, len(sizes) - 1))
    low, high = sizes[after - 1], sizes[after]
    return after - 1 + (size - low) / (high - low)


def _join(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(row) / len(row) for row in rows]


def _points(shares: Iterable[float]) -> str:
    values = list(shares)
    step = _WIDTH / max(len(values) - 1, 1)
    return " ".join(f"{i * step:.1f},{100 * (1 - share):.2f}" for i, share in enumerate(values))


def _tick_text(size: int) -> str:
    unit, word = next((row for row in _UNITS if size >= row[0]), (1, "B"))
    return f"{size / unit:g} {word}"


def _json(data: object) -> str:
    return html.escape(json.dumps(data))
