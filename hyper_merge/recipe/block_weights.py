"""Weights by block of the UNet, in the text form that people who merge pass around.

    0,0.1,0.2, ...                 one number for each block
    GRAD_V:0,1,0.9166667, ...      the same under a name, as a line of a file of presets
    0.5                            the same number for all

The order is that of supermerger and its relatives: BASE (everything outside of the UNet), IN00 and
on, M00, OUT00 and on: 26 numbers for Stable Diffusion 1.x and 2.x, 20 for XL. As there, what stands
before the first block (time and label embeddings) counts to IN00, and what follows the last one to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from hyper_merge.errors import RecipeError
from hyper_merge.recipe.parsing import number, parse_items
from hyper_merge.recipe.plain_values import expected_error, plain_value

BLOCKS: Final[Mapping[int, int]] = MappingProxyType({26: 12, 20: 9})
"""Blocks of input, as many as of output, by the count of numbers."""

_EXPECTED: Final = "26 numbers, or 20 for XL, such as 0,0.1,... or NAME:0,0.1,..., or one for all"
_NAME: Final = re.compile(r"\s*[^:,]*:")
_SECTION: Final = re.compile(r"(IN|OUT)(\d+)")

BlockWeights = tuple[float, ...]  # one number for all, or 20 or 26


def parse_block_weights(value: object) -> tuple[BlockWeights, ...] | None:
    """Returns the weights by block of every checkpoint; None for no difference between blocks."""
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise expected_error("a list of weights by block, one text for each checkpoint", value)
    weights = parse_items(value, _parse_one)
    if len({len(one) for one in weights} - {1}) > 1:
        raise RecipeError("some checkpoints have 20 weights and others 26: expected one kind")
    return weights


def format_block_weights(weights: tuple[BlockWeights, ...] | None) -> str:
    """Returns the text for a file's metadata."""
    if weights is None:
        return "null"
    return "; ".join(",".join(f"{x:g}" for x in one) for one in weights)


def weight_of_block(weights: BlockWeights, section: str, *, in_unet: bool) -> float:
    """Returns the weight of a section of the network.

    Args:
        weights: of one checkpoint.
        section: as `section_of` names it.
        in_unet: whether it is one of the UNet.

    >>> sdxl = tuple(map(float, range(20)))
    >>> [weight_of_block(sdxl, name, in_unet=True) for name in ("IN08", "MID", "OUT00", "TIME", "OUT")]
    [9.0, 10.0, 11.0, 1.0, 19.0]
    >>> weight_of_block(sdxl, "TE03", in_unet=False)
    0.0
    """
    if len(weights) == 1 or not in_unet:
        return weights[0]
    blocks = BLOCKS[len(weights)]
    if section == "MID":
        return weights[1 + blocks]
    match = _SECTION.fullmatch(section)
    if match is None:
        return weights[-1] if section == "OUT" else weights[1]
    return weights[(1 if match[1] == "IN" else 2 + blocks) + int(match[2])]


def _parse_one(value: object) -> BlockWeights:
    if isinstance(value, str):
        text = _NAME.sub("", value, count=1)
        items: list[object] = [plain_value(word.strip()) for word in text.split(",")]
    elif isinstance(value, list | tuple):
        items = list(value)
    else:
        items = [value]
    try:
        weights = tuple(number(0.0, math.inf)(item) for item in items)
    except RecipeError:
        raise expected_error(_EXPECTED, value) from None
    if len(weights) != 1 and len(weights) not in BLOCKS:
        raise expected_error(f"{_EXPECTED} ({len(weights)} here)", value)
    return weights
