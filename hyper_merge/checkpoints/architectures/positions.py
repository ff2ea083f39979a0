"""The number of positions at which a layer is applied in one run of its network, by the layer's path.

A matrix or kernel is used once for every pixel of its level, token or patch, and once in all where it
reads the time alone. Its change does as much more to the output. What is read at every level, as the
time embedding is, counts as if it were used at every pixel.
"""

from __future__ import annotations

import re
from typing import Final

TOKENS: Final = 77
"""Tokens of a prompt, with what it is filled up with."""

_PATCHES_OF_TEXT: Final = 256  # tokens of T5, at most, as hosts run it beside CLIP
_PATCH: Final = 2  # height and width of a transformer's patch, in the latent
_LATENT: Final = 8  # pixels for one of the latent, in height and width
_PER_LEVEL: Final = 3  # blocks of a UNet's level, in both directions

_ONCE: Final = re.compile(r".*(\.emb_layers\.|modulation(_\w+)?\.|_mod\.).*")
_OF_TEXT: Final = re.compile(r".*\.attn2\.to_[kv]")
_SIDE: Final = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d)\.?(.*)")
_CONTEXT: Final = re.compile(
    r"(joint_blocks\.\d+\.context_block|\w+_blocks\.\d+\.txt_\w+|context_refiner\.\d+)\..*"
    r"|transformer_blocks\.\d+\.attn\.(add_[qkv]_proj|to_add_out)"
    r"|blocks\.\d+\.cross_attn\.[kv](_proj)?|llm_adapter\..*"
)
_BOTH: Final = re.compile(r"(single_blocks|layers)\..*")


def text_positions(path: str, resolution: int) -> int:  # noqa: ARG001 - of every layer the same
    """Returns the positions of a layer of a text encoder."""
    return TOKENS


def unet_positions(path: str, resolution: int, levels: int) -> int:
    """Returns the positions of a layer of an LDM UNet.

    Args:
        path: dotted, within the UNet.
        resolution: height and width of the pictures in pixels.
        levels: of the UNet; each halves height and width.

    >>> unet_positions("input_blocks.4.0.in_layers.2", 512, 4)
    1024
    """
    if _ONCE.fullmatch(path):
        return 1
    if _OF_TEXT.fullmatch(path):
        return TOKENS
    return (resolution // _LATENT >> _level(path, levels)) ** 2


def positions_on_four_levels(path: str, resolution: int) -> int:
    """Returns the positions of a layer of the UNet of SD 1.x, SD 2.x and SDXL's refiner."""
    return unet_positions(path, resolution, 4)


def positions_on_three_levels(path: str, resolution: int) -> int:
    """Returns the positions of a layer of SDXL's UNet."""
    return unet_positions(path, resolution, 3)


def transformer_positions(path: str, resolution: int) -> int:
    """Returns the positions of a layer of a transformer of patches, as SD 3 and Flux are."""
    if _ONCE.fullmatch(path):
        return 1
    text = TOKENS + _PATCHES_OF_TEXT
    pixels = (resolution // (_LATENT * _PATCH)) ** 2
    if _CONTEXT.fullmatch(path):
        return text
    return pixels + text if _BOTH.fullmatch(path) else pixels


def _level(path: str, levels: int) -> int:
    """Returns how often height and width of a layer's output are halved."""
    match = _SIDE.fullmatch(path)
    if match is None:
        return levels - 1 if path.startswith("middle_block.") else 0
    side, number, place, within = match[1], int(match[2]), int(match[3]), match[4]
    if side == "input_blocks":
        return -(-number // _PER_LEVEL) if within == "op" else max(number - 1, 0) // _PER_LEVEL
    upsampler = place > 0 and within == "conv"
    return max(levels - 1 - number // _PER_LEVEL - upsampler, 0)  # of unknown variants too
