"""Formats the texts of a comparison's grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from hyper_merge.operations.compare.image_difference import AMPLIFIED, LEVELS, PERCEPTUAL
from hyper_merge.operations.compare.records import ComparisonFigures
from hyper_merge.operations.compare.request import PictureKey, PictureSettings

ROW_TITLES: Final[Mapping[str, str]] = {
    "restored": "hyper-model + LoRAs",
    "original": "original",
    "average": "hyper-model alone",
}
"""Titles of the grid's rows."""

DIFFERENCE_TITLES: Final[Mapping[str, str]] = {
    "restored": f"difference, {AMPLIFIED} times",
    "average": f"alone, difference, {AMPLIFIED} times",
}
"""Titles of the rows with differences from the original, by what was drawn."""

_NOUNS: Final[Mapping[str, str]] = {**ROW_TITLES, "average": "average"}


def format_caption(figures: ComparisonFigures, row: str) -> str:
    """Returns how far a picture is from the original's; empty where there is no original."""
    if row not in figures.pixels:
        return ""
    mean = figures.pixels[row]
    text = f"{mean:.2f} of {LEVELS} ({mean / LEVELS:.1%})"
    if row in figures.perceptual:
        text += f", {PERCEPTUAL} {figures.perceptual[row]:.3f}"
    return text


def format_picture(key: PictureKey) -> str:
    """Returns what a picture shows, for messages about progress."""
    parts = (key.checkpoint, _NOUNS[key.row], f"seed {key.seed}")
    return ", ".join(filter(None, parts))


def format_heading(run: str, settings: PictureSettings) -> tuple[str, str]:
    """Returns the two lines above a grid."""
    facts = (
        f"{run}: {settings.sampler}, {settings.steps} steps, CFG scale {settings.cfg_scale:g},"
        f" {settings.width}x{settings.height}"
    )
    return facts, "figures: mean difference from the original"
