"""Plots hold the report's figures, and no name makes them overlap or leave the page."""

import io
import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_report import REPORT

from hyper_merge.runs.report import CheckpointReport, PartLoss

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.text import Text

from hyper_merge.ui.plots import canvas
from hyper_merge.ui.plots.report import explained_plot, parts_plot, similarity_plot

SECTIONS = [
    *((f"TE{n:02d}", "text_encoder") for n in range(12)),
    *((f"IN{n:02d}", "unet") for n in range(1, 12)),
    ("MID", "unet"),
    *((f"OUT{n:02d}", "unet") for n in range(12)),
]
PLOTS = (explained_plot, similarity_plot, parts_plot)
NAMES = {
    "two": ["a", "b"],
    "six alike": [f"checkpoint_{i}" for i in range(6)],
    "twenty long": [
        f"aVeryLongName_v{i}_with_a_tail_inpainting_fp16_pruned_{i}" for i in range(20)
    ],
    "other letters": ["真实感模型", "Модель", "é\N{GRINNING FACE}"],
}


def report(names, blocks=4):
    k = len(names)
    curve = [[(1 - 0.5**j) * (1 - i / 100) for i in range(k)] for j in range(blocks + 1)]
    rows = [CheckpointReport(name, 0.9, 0.9, 0.9, 0.3, 0.0, (1.0,) * blocks) for name in names]
    return replace(
        REPORT,
        loras=tuple(f"mix_{j}-8" for j in range(blocks)),
        checkpoints=tuple(rows),
        curve=tuple(map(tuple, curve)),
        similarity=tuple(tuple(1.0 if r == c else (r - c) / k for c in range(k)) for r in range(k)),
        parts=tuple(
            PartLoss(name, which, i / 1000, i / 2000) for i, (name, which) in enumerate(SECTIONS)
        ),
    )


def drawn(figure):
    """Lays a page out and returns it with the boxes of all words on it, in pixels."""
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    texts = [*figure.texts, *axes.texts, axes.xaxis.label]
    texts += [*in_view(axes.xaxis), *in_view(axes.yaxis)]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    words = [text for text in texts if text.get_text()]
    return figure.bbox, [(text, Text.get_window_extent(text)) for text in words]


def in_view(axis):
    low, high = sorted(axis.get_view_interval())
    labels = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return [label for place, label in labels if low <= place <= high]


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_all_words_are_on_the_page_and_apart(plot, names):
    page, texts = drawn(plot(report(names)))
    assert texts
    for text, box in texts:
        assert page.x0 <= box.x0 < box.x1 <= page.x1, text
        assert page.y0 <= box.y0 < box.y1 <= page.y1, text
    for (one, first), (other, second) in itertools.combinations(texts, 2):
        assert not first.padded(-1).overlaps(second.padded(-1)), (one, other)


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_the_ground_is_transparent(plot, names):
    stream = io.BytesIO()
    plot(report(names)).savefig(stream, format="png")
    stream.seek(0)
    alpha = imread(stream)[..., 3]
    assert alpha[0, 0] == alpha[-1, -1] == 0
    assert alpha.max() == 1


def test_the_lines_are_the_curve():
    sample = report(NAMES["two"])
    axes = explained_plot(sample).axes[0]
    for line, values in zip(axes.lines, zip(*sample.curve, strict=True), strict=True):
        assert list(line.get_ydata()) == list(values)
    words = [text.get_text() for text in axes.texts]
    assert words == ["93.8%  a", "92.8%  b"]


def test_many_lines_name_only_best_and_worst():
    axes = explained_plot(report(NAMES["twenty long"])).axes[0]
    assert len(axes.lines) == 20
    assert [text.get_text().split()[0] for text in axes.texts] == ["93.8%", "75.9%"]


def test_the_cells_are_the_similarity():
    sample = report(NAMES["six alike"])
    axes = similarity_plot(sample).axes[0]
    cells = axes.images[0].get_array()
    for r, c in itertools.product(range(6), repeat=2):
        assert cells[r, c] == sample.similarity[r][c]
    assert not np.ma.is_masked(cells)
    assert [text.get_text() for text in axes.texts[:2]] == ["1", "-0.17"]


def test_the_bars_are_the_shares_of_the_sections():
    sample = report(NAMES["two"])
    axes = parts_plot(sample).axes[0]
    energies, lost = axes.containers
    assert [bar.get_height() for bar in energies] == [part.energy for part in sample.parts]
    assert [bar.get_height() for bar in lost] == [part.lost for part in sample.parts]
    assert [text.get_text() for text in axes.texts] == ["TE", "IN", "MID", "OUT"]


def test_each_text_encoder_has_a_group_of_its_own():
    parts = tuple(
        PartLoss(f"TE{encoder}.{n:02d}", "text_encoder", 0.1, 0.1)
        for encoder, count in ((1, 12), (2, 32))
        for n in range(count)
    )
    figure = parts_plot(replace(REPORT, parts=parts))
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["TE1", "TE2"]
    numbers = [label.get_text() for label in axes.get_xticklabels()]
    assert numbers[:4] == ["00", "", "02", ""]


@pytest.mark.parametrize("plot", PLOTS)
def test_a_report_of_the_first_version_gets_a_note(plot):
    axes = plot(replace(REPORT, curve=(), similarity=(), parts=())).axes[0]
    assert "earlier version" in axes.texts[0].get_text()


@given(st.lists(st.floats(0, 1), max_size=18))
def test_labels_keep_their_order_and_their_distance(heights):
    places = canvas.spread_labels(heights)
    gap = canvas.LABEL_GAP - 1e-9
    for one, other in itertools.combinations(range(len(heights)), 2):
        assert abs(places[one] - places[other]) >= gap
        if heights[one] != heights[other]:
            assert (heights[one] < heights[other]) == (places[one] < places[other])
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)


def luminance(colour):
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(colour)]
    return sum(share * x for share, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


# hue-rotate(180deg). Source: W3C Filter Effects, section 8.4 (type "hueRotate").
TURNED = ((-0.574, 1.43, 0.144), (0.426, 0.43, 0.144), (0.426, 1.43, -0.856))


def in_a_dark_theme(colour):
    """Returns what the style sheet's filter makes of a colour."""
    inverted = [1 - x for x in to_rgb(colour)]
    rows = (sum(x * y for x, y in zip(row, inverted, strict=True)) for row in TURNED)
    return [min(max(value, 0.0), 1.0) for value in rows]


def contrast(*colours):
    bright, dim = sorted(map(luminance, colours), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


LETTERS = (canvas.GREY, canvas.STRONG, *canvas.COLOURS)


@pytest.mark.parametrize("colour", [*LETTERS, canvas.PALE, canvas.WORST])
def test_every_colour_stands_out_in_both_themes(colour):
    """By 4.5 to 1, surfaces by 3 to 1. Source: WCAG 2.1, 1.4.3 and 1.4.11."""
    least = 4.5 if colour in LETTERS else 3
    assert contrast(colour, "#ffffff") >= least
    assert contrast(in_a_dark_theme(colour), "#0b0f19") >= least
    style = (Path(__file__).parents[3] / "style.css").read_text(encoding="utf-8")
    rule = r"\.dark #hyper_merge_tab \.hm-plot \{\s*filter: invert\(1\) hue-rotate\(180deg\);\s*\}"
    assert re.search(rule, style)
