"""From a layer's path to the section of the network it lies in, as people who merge call them."""

from __future__ import annotations

import re
from typing import Final

OTHER: Final = "other"
"""The section of a layer that no rule knows."""

_NUMBERED: Final = (
    (re.compile(r"(^|\.)input_blocks\.(\d+)\."), "IN"),
    (re.compile(r"(^|\.)output_blocks\.(\d+)\."), "OUT"),
    (re.compile(r"(^|\.)(?:layers|resblocks)\.(\d+)\."), "TE"),
)
_MIDDLE: Final = re.compile(r"(^|\.)middle_block\.")


def section_of(path: str) -> str:
    """IN00..IN11, MID and OUT00..OUT11 of an LDM UNet, TE00.. of a CLIP text encoder.

    >>> section_of("output_blocks.5.1.transformer_blocks.0.attn1.to_q")
    'OUT05'
    >>> section_of("encoder.layers.11.mlp.fc1")
    'TE11'
    """
    if _MIDDLE.search(path):
        return "MID"
    for pattern, word in _NUMBERED:
        if match := pattern.search(path):
            return f"{word}{int(match[2]):02d}"
    return OTHER
