"""Draws the grid of a comparison: pictures and captions in, one picture out; no files, no host."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from PIL import Image, ImageDraw

from hyper_merge.loras.card_images import draw_text_line

_GROUND, _TEXT, _QUIET, _HOLE = "#1a2029", "#f2f4f6", "#a9b2bd", "#28303b"

_MARGIN: Final = 16  # pixels, all of these
_GAP: Final = 8
_NARROWEST: Final = 168  # a column, whose captions need room
_LABELS: Final = 200  # the column with the rows' names
_HEAD: Final = 40  # prompt and seed above a band
_NAMES: Final = 28  # the checkpoints' names above their columns
_CAPTION: Final = 26  # figures below a row
_LETTERS: Final = 18
_SMALL: Final = 15

_MOST_PIXELS: Final = 48_000_000  # of all pictures; viewers, and Pillow, refuse much larger ones


@dataclass(frozen=True)
class Cell:
    """A cell of a band.

    Attributes:
        picture: Its content; None leaves it empty.
        note: Why it is empty.
        caption: Below it; empty for none.
    """

    picture: Image.Image | None
    note: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Band:
    """One prompt with one seed: a row of pictures for each way of making them.

    Attributes:
        title: The text above it.
        rows: By their names; as many cells as the grid has columns.
    """

    title: str
    rows: Mapping[str, Sequence[Cell]]


def draw_grid(
    heading: Sequence[str], columns: Sequence[str], bands: Sequence[Band], size: tuple[int, int]
) -> Image.Image:
    """Returns a picture with all bands below one another.

    Pictures keep their pixels unless the whole would be too large to be opened.

    Args:
        heading: lines at the top.
        columns: names of the columns.
        bands: one after the other.
        size: width and height of the pictures in pixels.
    """
    rows = sum(len(band.rows) for band in bands)
    area = rows * len(columns) * size[0] * size[1]
    scale = min(1.0, math.sqrt(_MOST_PIXELS / area))
    cell = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    top = _MARGIN + _NAMES * len(heading)
    height = top + sum(_height(band, cell[1]) for band in bands) + _MARGIN
    drawn = _Drawing(columns, cell, top, height)
    for number, line in enumerate(heading):
        place = _MARGIN + number * _NAMES
        drawn.write(_MARGIN, place, line, _TEXT, _LETTERS, drawn.width - 2 * _MARGIN)
    for band in bands:
        drawn.add(band)
    return drawn.image


class _Drawing:
    """A grid that is being drawn."""

    def __init__(
        self, columns: Sequence[str], cell: tuple[int, int], top: int, height: int
    ) -> None:
        self._columns = columns
        self._cell = cell
        self._step = max(cell[0], _NARROWEST) + _GAP
        self.width = 2 * _MARGIN + _LABELS + self._step * len(columns) - _GAP
        self.image = Image.new("RGB", (self.width, height), _GROUND)
        self._draw = ImageDraw.Draw(self.image)
        self._top = top

    def write(
        self, left: float, top: float, text: str, colour: str, size: int, width: float
    ) -> None:
        draw_text_line(self._draw, (left, top), text, size, colour, width)

    def add(self, band: Band) -> None:
        room = self.width - 2 * _MARGIN
        self.write(_MARGIN, self._top + 8, band.title, _TEXT, _LETTERS, room)
        self._top += _HEAD
        for place, name in enumerate(self._columns):
            self.write(self._left(place), self._top, name, _TEXT, _LETTERS, self._step - _GAP)
        self._top += _NAMES
        for name, cells in band.rows.items():
            self._add_row(name, cells)

    def _add_row(self, name: str, cells: Sequence[Cell]) -> None:
        middle = self._top + self._cell[1] / 2 - _SMALL
        self.write(_MARGIN, middle, name, _QUIET, _SMALL, _LABELS - _GAP)
        for place, cell in enumerate(cells):
            self._add_cell(self._left(place), cell)
        self._top += self._cell[1] + _GAP
        if any(cell.caption for cell in cells):
            self._top += _CAPTION

    def _add_cell(self, left: int, cell: Cell) -> None:
        width, height = self._cell
        if cell.picture is None:
            self._draw.rectangle(
                (left, self._top, left + width - 1, self._top + height - 1), fill=_HOLE
            )
            middle = self._top + height / 2 - _SMALL
            self.write(left + 6, middle, cell.note, _QUIET, _SMALL, self._step - _GAP - 12)
        else:
            picture = cell.picture.convert("RGB")
            if picture.size != self._cell:
                picture = picture.resize(self._cell, Image.Resampling.LANCZOS)
            self.image.paste(picture, (left, self._top))
        below = self._top + height + 4
        self.write(left, below, cell.caption, _QUIET, _SMALL, self._step - _GAP)

    def _left(self, place: int) -> int:
        return _MARGIN + _LABELS + place * self._step


def _height(band: Band, cell: int) -> int:
    captions = sum(any(column.caption for column in row) for row in band.rows.values())
    return _HEAD + _NAMES + len(band.rows) * (cell + _GAP) + captions * _CAPTION
