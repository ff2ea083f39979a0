"""Sections of a network, as people who merge call them, by a layer's path."""

from __future__ import annotations

import re
from typing import Final

OTHER: Final = "other"
"""The section of a layer that no rule knows."""

_NUMBERED: Final = (
    (re.compile(r"(?:^|.*\.)input_blocks\.(\d+)\..*"), "IN"),
    (re.compile(r"(?:^|.*\.)output_blocks\.(\d+)\..*"), "OUT"),
    (re.compile(r"(?:^|.*\.)joint_blocks\.(\d+)\..*"), "JOINT"),
    (re.compile(r"(?:^|.*\.)double_blocks\.(\d+)\..*"), "DOUBLE"),
    (re.compile(r"(?:^|.*\.)single_blocks\.(\d+)\..*"), "SINGLE"),
    (re.compile(r"(?:transformer_)?blocks\.(\d+)\..*"), "BLOCK"),
    (re.compile(r"noise_refiner\.(\d+)\..*"), "NOISE"),
    (re.compile(r"context_refiner\.(\d+)\..*"), "CONTEXT"),
    (re.compile(r"layers\.(\d+)\..*"), "LAYER"),
)
_ENCODER: Final = re.compile(r"(?:^|.*\.)(?:layers|resblocks)\.(\d+)\..*")
_ENDS: Final = {
    "time_embed": "TIME",
    "label_emb": "LABEL",
    "out": "OUT",
    "img_in": "IMG_IN",
    "txt_in": "TXT_IN",
    "time_in": "TIME",
    "vector_in": "VECTOR",
    "guidance_in": "GUIDANCE",
    "final_layer": "FINAL",
    "llm_adapter": "ADAPTER",
}
_MIDDLE: Final = re.compile(r"(?:^|.*\.)middle_block\..*")


def section_of(path: str, encoder: str = "TE") -> str:
    """Returns the section of a layer: IN00.., DOUBLE00.., TE00.. by the number of its block.

    In an LDM UNet also MID, and TIME, LABEL and OUT at the ends; in a transformer JOINT00..,
    DOUBLE00.., SINGLE00.., BLOCK00.., LAYER00.. and those of refiners.

    Args:
        path: dotted, within its network.
        encoder: the word for layers of a text encoder (TE00..); with several of them one each, as
            by `functools.partial(section_of, encoder="TE2.")`.

    >>> section_of("output_blocks.5.1.transformer_blocks.0.attn1.to_q")
    'OUT05'
    >>> section_of("encoder.layers.11.mlp.fc1", "TE2.")
    'TE2.11'
    >>> section_of("time_embed.0")
    'TIME'
    """
    if _MIDDLE.fullmatch(path):
        return "MID"
    for pattern, word in (*_NUMBERED, (_ENCODER, encoder)):
        if match := pattern.fullmatch(path):
            return f"{word}{int(match[1]):02d}"
    return _ENDS.get(path.partition(".")[0], OTHER)
