"""Draws pictures for the cards of WebUIs: numbers in, PNG bytes out, no files but the system's fonts.

A card shows the picture at two thirds of its size and lays the file's name over its lower third,
which therefore stays empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Final, TypeAlias

from PIL import Image, ImageDraw, ImageFont

_Font: TypeAlias = "ImageFont.FreeTypeFont | ImageFont.ImageFont"

_SIZE: Final = (400, 600)  # of the cards' shape, 2 to 3
_MARGIN: Final = 32
_BODY: Final = 160  # from here, below the heading, down to what the card covers at 410

_GROUND, _TEXT, _QUIET, _AXIS = "#1a2029", "#f2f4f6", "#a9b2bd", "#56606d"
_POSITIVE, _NEGATIVE = "#5aa2dc", "#e8914a"

_NAME_SIZE, _LINE_SIZE, _ROW_SIZE = 36, 25, 20  # points, which are pixels here
_ROW: Final = 44  # pixels of a bar with its label
_ROWS: Final = 6  # that have room
_LINE: Final = 30  # pixels of a line of a list
_LINES: Final = 8  # that have room

_FONTS: Final = ("DejaVuSans.ttf", "segoeui.ttf", "Arial.ttf", "LiberationSans-Regular.ttf")
_EASTERN_FONTS: Final = ("NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "wqy-microhei.ttc")
_EASTERN: Final = 0x2E80  # the first letter that needs one of those


def lora_picture(
    name: str, index: int, count: int, rank: int, multipliers: Mapping[str, float]
) -> bytes:
    """Returns the PNG of a LoRA's card: its run, its place, and every checkpoint's multiplier.

    Args:
        name: of the run.
        index: place in the rank list, from 0.
        count: of the run's LoRAs.
        rank: in the run's list.
        multipliers: by checkpoint.
    """
    image, draw = _card(name, f"LoRA {index + 1} of {count}", f"rank {rank}")
    rows = _most(multipliers)
    largest = max([1.0, *(abs(x) for x in multipliers.values())])
    for row, (checkpoint, multiplier) in enumerate(rows.items()):
        _bar(draw, _BODY + row * _ROW, multiplier / largest)
        _label(draw, _BODY + row * _ROW, checkpoint, f"{multiplier:+.2f}")
    if len(rows) < len(multipliers):
        rest = f"and {len(multipliers) - len(rows)} more"
        draw_text_line(draw, (_MARGIN, _BODY + len(rows) * _ROW), rest, _ROW_SIZE, _QUIET)
    return _png(image)


def hyper_model_picture(name: str, checkpoints: Sequence[str]) -> bytes:
    """Returns the PNG of a hyper-model's card: the checkpoints of which it is the average.

    Args:
        name: of its file, without suffix.
        checkpoints: names of the sources' files, without suffix.
    """
    image, draw = _card(name, "hyper-model", f"average of {len(checkpoints)} checkpoints")
    fits = len(checkpoints) <= _LINES
    lines = list(checkpoints if fits else checkpoints[: _LINES - 1])
    lines += [] if fits else [f"and {len(checkpoints) - len(lines)} more"]
    for row, line in enumerate(lines):
        draw_text_line(draw, (_MARGIN, _BODY + row * _LINE), line, _ROW_SIZE, _QUIET)
    return _png(image)


def _card(*lines: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Returns an empty card with a name and two lines at its top."""
    image = Image.new("RGB", _SIZE, _GROUND)
    draw = ImageDraw.Draw(image)
    draw_text_line(draw, (_MARGIN, 28), lines[0], _NAME_SIZE, _TEXT)
    for row, line in enumerate(lines[1:]):
        draw_text_line(draw, (_MARGIN, 76 + 32 * row), line, _LINE_SIZE, _QUIET)
    return image, draw


def _most(multipliers: Mapping[str, float]) -> Mapping[str, float]:
    """Returns all multipliers or, where they do not fit, the largest in size; order stays."""
    if len(multipliers) <= _ROWS:
        return multipliers
    size = {checkpoint: abs(x) for checkpoint, x in multipliers.items()}
    most = sorted(size, key=lambda checkpoint: -size[checkpoint])[: _ROWS - 1]
    return {checkpoint: x for checkpoint, x in multipliers.items() if checkpoint in most}


def _bar(draw: ImageDraw.ImageDraw, top: float, share: float) -> None:
    """Draws a bar from the middle to the right, or to the left below 0, under a row's label."""
    middle, reach = _SIZE[0] / 2, _SIZE[0] / 2 - _MARGIN
    axis = (_MARGIN, top + 32, _SIZE[0] - _MARGIN, top + 32)
    draw.line(axis, fill=_AXIS)
    left, right = sorted((middle, middle + share * reach))
    colour = _POSITIVE if share > 0 else _NEGATIVE
    draw.rectangle((left, top + 28, right, top + 36), fill=colour)


def _label(draw: ImageDraw.ImageDraw, top: float, name: str, number: str) -> None:
    width = _font(_ROW_SIZE, eastern=False).getlength(number)
    right = _SIZE[0] - _MARGIN - width
    draw_text_line(draw, (_MARGIN, top), name, _ROW_SIZE, _TEXT, right - _MARGIN - 12)
    draw_text_line(draw, (right, top), number, _ROW_SIZE, _QUIET)


def draw_text_line(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    size: int,
    colour: str,
    width: float = _SIZE[0] - 2 * _MARGIN,
) -> None:
    """Draws one line, without its middle where it is too long.

    Args:
        draw: of the picture.
        place: left and top, in pixels.
        text: of any script for which the system has a font.
        size: of the letters, in pixels.
        colour: as Pillow names them.
        width: pixels that the line may take.
    """
    text = " ".join(text.split())
    font = _font(size, eastern=any(ord(letter) >= _EASTERN for letter in text))
    if not isinstance(font, ImageFont.FreeTypeFont):
        text = text.encode("latin-1", "replace").decode("latin-1")  # it has no other letters
    line, kept = text, len(text)
    while kept > 1 and font.getlength(line) > width:
        kept -= 1
        line = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
    draw.text(place, line, fill=colour, font=font)


@cache
def _font(size: int, *, eastern: bool) -> _Font:
    """Returns the first font there is; at worst Pillow's, which may have one small size only."""
    names = (*(_EASTERN_FONTS if eastern else ()), *_FONTS, *_fonts_of_matplotlib())
    font = next((candidate for name in names if (candidate := _opened(name, size))), None)
    if font:
        return font
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1
        return ImageFont.load_default()


def _opened(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


def _fonts_of_matplotlib() -> tuple[str, ...]:
    """Returns where matplotlib keeps its font: both WebUIs have it, and it is not loaded here."""
    spec = find_spec("matplotlib")
    folders = (spec and spec.submodule_search_locations) or ()
    return tuple(
        str(Path(folder, "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")) for folder in folders
    )


def _png(image: Image.Image) -> bytes:
    stream = BytesIO()
    image.save(stream, "PNG")  # smaller by 4 % if optimized, which takes five times as long
    return stream.getvalue()
