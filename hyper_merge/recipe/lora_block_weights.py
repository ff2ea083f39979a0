"""Weights by block for LoRAs, in the text form of the extension sd-webui-lora-block-weight (`:lbw=`).

    1,0,0,1, ...         one number for each block
    OUTD:1,0,0,1, ...    the same under a name, as a line of its presets
    lbw=1,0,0,1, ...     the same as it stands in a prompt's tag
    OUTD                 a preset that comes with the extension: 17 numbers
    0.5                  the same number for everything

The first number, BASE, is that of text encoders. Then come the blocks of the UNet: all 25 of Stable
Diffusion 1.x and 2.x (26 numbers) or all 19 of XL (20), or those with attention alone (17, 12); the
others are 0 then. Flux has 61: CLIP, T5, what stands before the blocks, 19 double and 38 single
blocks, and what follows them. Layers outside of all these keep their multiplier.

Source: hako-mikan's sd-webui-lora-block-weight, `BLOCKID12` to `BLOCKIDFLUX`, `DEF_WEIGHT_PRESET` and
`ratiodealer`.
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

LoraBlockWeights = tuple[float, ...]  # 1, 12, 17, 20, 26 or 61


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
        61: (
            *("CLIP", "T5", "IN"),
            *(f"DOUBLE{number:02d}" for number in range(19)),
            *(f"SINGLE{number:02d}" for number in range(38)),
            "FINAL",
        ),
    }
)
_FAMILIES: Final[Mapping[int, tuple[str, ...]]] = MappingProxyType(
    {
        1: ("",),
        **dict.fromkeys((12, 20), ("sdxl",)),
        **dict.fromkeys((17, 26), ("sd1", "sd2")),
        61: ("flux_",),
    }
)
"""How the names of the families begin with which a count of numbers goes."""

# What the extension brings, as digits.
_PRESETS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "NONE": "00000000000000000",
        "ALL": "11111111111111111",
        "INS": "11110000000000000",
        "IND": "10001110000000000",
        "INALL": "11111110000000000",
        "MIDD": "10001111111100000",
        "OUTD": "10000000111100000",
        "OUTS": "10000000000011111",
        "OUTALL": "10000000111111111",
    }
)
_BLOCK: Final = re.compile(r"(IN|OUT)\d+|MID")
_BEFORE: Final = ("IMG_IN", "TXT_IN", "TIME", "VECTOR", "GUIDANCE")
"""Sections of Flux that its third number is for."""

_START: Final = re.compile(r"\s*:?(lbw=|[^:,=]*:)", re.IGNORECASE)
COUNTS: Final = "12 or 20 numbers for XL, 17 or 26 for SD 1.x and 2.x, 61 for Flux"
_EXPECTED: Final = f"{COUNTS}, such as 1,0,... or NAME:1,0,..., or one for all"


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
        in_unet: whether it is one of the UNet or transformer.

    >>> xl = tuple(map(float, range(12)))
    >>> [weight_in(xl, name, in_unet=True) for name in ("IN04", "IN03", "MID", "OUT05", "TIME")]
    [1.0, 0.0, 5.0, 11.0, 1.0]
    >>> weight_in((0.5, *xl[1:]), "TE03", in_unet=False)
    0.5
    >>> flux = tuple(map(float, range(61)))
    >>> [weight_in(flux, name, in_unet=True) for name in ("TXT_IN", "DOUBLE00", "SINGLE37", "FINAL")]
    [2.0, 3.0, 59.0, 60.0]
    """
    if len(weights) == 1 or not in_unet:
        return weights[0]
    is_flux = len(weights) == max(_BLOCKS)
    name = "IN" if is_flux and section in _BEFORE else section
    other = 0.0 if not is_flux and _BLOCK.fullmatch(section) else 1.0
    return dict(zip(_BLOCKS[len(weights)], weights, strict=True)).get(name, other)


def go_with(weights: LoraBlockWeights, family: str) -> bool:
    """Tells whether weights by block are those of a family's network, by its name.

    >>> go_with((1.0,) * 12, "sdxl"), go_with((1.0,) * 12, "sdxl_refiner"), go_with((2.0,), "wan")
    (True, False, True)
    """
    if family == "sdxl_refiner" and len(weights) > 1:  # with blocks of its own
        return False
    return family.startswith(_FAMILIES[len(weights)])


def format_lora_block_weights(weights: LoraBlockWeights) -> str:
    """Returns the numbers as the extension writes them."""
    return ",".join(f"{x:g}" for x in weights)


def _parse_one(value: object) -> LoraBlockWeights:
    if isinstance(value, str):
        text = _START.sub("", value, count=1)
        words = _PRESETS.get(text.strip(), text.split(","))
        items: list[object] = [plain_value(word.strip()) for word in words]
    elif isinstance(value, list | tuple):
        items = list(value)
    else:
        items = [value]
    try:
        weights = tuple(number(-math.inf, math.inf)(item) for item in items)
    except RecipeError:
        raise expected_error(_EXPECTED, value) from None
    if len(weights) not in _FAMILIES:
        raise expected_error(f"{_EXPECTED} ({len(weights)} here)", value)
    return weights
