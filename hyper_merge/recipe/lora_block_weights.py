"""Weights by block for LoRAs, in the text form of the extension sd-webui-lora-block-weight (`:lbw=`).

    1,0,0,1, ...         one number for each block
    OUTD:1,0,0,1, ...    the same under a name, as a line of its presets

The first number, BASE, is that of text encoders. Then come the blocks of the UNet: all 25 of Stable
Diffusion 1.x and 2.x (26 numbers) or all 19 of XL (20), or those with attention alone (17, 12); the
others are 0 then. Layers outside of all blocks keep their multiplier.

Source: hako-mikan's sd-webui-lora-block-weight, `BLOCKID12` to `BLOCKID26` and `ratiodealer`.
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

LoraBlockWeights = tuple[float, ...]  # 12, 17, 20 or 26


def _names(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> tuple[str, ...]:
    return (
        "BASE",
        *(f"IN{number:02d}" for number in inputs),
        "MID",
        *(f"OUT{number:02d}" for number in outputs),
    )


_BLOCKS: Final[Mapping[int, tuple[str, ...]]] = MappingProxyType(
    {
        12: _names((4, 5, 7, 8), tuple(range(6))),
        17: _names((1, 2, 4, 5, 7, 8), tuple(range(3, 12))),
        20: _names(tuple(range(9)), tuple(range(9))),
        26: _names(tuple(range(12)), tuple(range(12))),
    }
)
XL: Final = (12, 20)
"""How many numbers go with Stable Diffusion XL; the others with 1.x and 2.x."""

_BLOCK: Final = re.compile(r"(IN|OUT)\d+|MID")
_NAME: Final = re.compile(r"\s*[^:,]*:")
_EXPECTED: Final = (
    "12 or 20 numbers for XL, 17 or 26 for SD 1.x and 2.x, such as 1,0,... or NAME:1,0,..."
)


def parse_lora_block_weights(value: object) -> tuple[LoraBlockWeights, ...] | None:
    """Returns the weights by block of every LoRA; None where all blocks count alike.

    Raises:
        RecipeError: it is no list of such texts.
    """
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise expected_error("a list of weights by block, one text for each LoRA", value)
    return parse_items(value, _parse_one)


def weight_in(weights: LoraBlockWeights, section: str, *, in_unet: bool) -> float:
    """Returns by what the layers of a section are multiplied.

    Args:
        weights: of one LoRA.
        section: as `section_of` names it.
        in_unet: whether it is one of the UNet.

    >>> xl = tuple(map(float, range(12)))
    >>> [weight_in(xl, name, in_unet=True) for name in ("IN04", "IN03", "MID", "OUT05", "TIME")]
    [1.0, 0.0, 5.0, 11.0, 1.0]
    >>> weight_in((0.5, *xl[1:]), "TE03", in_unet=False)
    0.5
    """
    if not in_unet:
        return weights[0]
    if not _BLOCK.fullmatch(section):
        return 1.0
    return dict(zip(_BLOCKS[len(weights)], weights, strict=True)).get(section, 0.0)


def _parse_one(value: object) -> LoraBlockWeights:
    if isinstance(value, str):
        words = _NAME.sub("", value, count=1).split(",")
        items: list[object] = [plain_value(word.strip()) for word in words]
    elif isinstance(value, list | tuple):
        items = list(value)
    else:
        raise expected_error(_EXPECTED, value)
    try:
        weights = tuple(number(-math.inf, math.inf)(item) for item in items)
    except RecipeError:
        raise expected_error(_EXPECTED, value) from None
    if len(weights) not in _BLOCKS:
        raise expected_error(f"{_EXPECTED} ({len(weights)} here)", value)
    return weights
