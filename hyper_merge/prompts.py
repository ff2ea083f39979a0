"""Multipliers as prompt tags and back; text only, no files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

DIGITS: Final = 5
"""Decimals of a multiplier in a prompt: it is off by 5e-6 at most."""

_TAG: Final = re.compile(r"<lora:([^>]*)>")
_NAME: Final = re.compile(r"[^:<>=\n]+")  # what a host's parser takes for one name
_NUMBER: Final = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)\s*")


def lora_names(name: str, ranks: Sequence[int]) -> tuple[str, ...]:
    """File stems of the LoRAs, which are also their names in prompts.

    >>> lora_names("mix", [128, 64])
    ('mix_0-128', 'mix_1-64')
    """
    return tuple(f"{name}_{index}-{rank}" for index, rank in enumerate(ranks))


def companion_names(names: Sequence[str]) -> tuple[str, ...]:
    """File stems of the LoRAs' companions.

    >>> companion_names(["mix_0-128"])
    ('mix_0-128-exact',)
    """
    return tuple(f"{name}-exact" for name in names)


def tag(name: str, multiplier: float, digits: int = DIGITS) -> str:
    """What adds one LoRA in a prompt.

    Args:
        name: the LoRA's file stem.
        multiplier: any finite number.
        digits: decimals; never an exponent, which not all hosts' buttons understand.

    Raises:
        ValueError: a name that prompts cannot hold, or a multiplier that is not finite.

    >>> tag("mix_0-128", 0.91234567)
    '<lora:mix_0-128:0.91235>'
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"expected a name without : < > = and line breaks, got {name!r}")
    rounded = round(float(multiplier), digits) + 0.0  # -0.0 + 0.0 is 0.0
    text = f"{rounded:.{digits}f}"
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"expected a finite multiplier for {name}, got {text}")
    return f"<lora:{name}:{text}>"


def tags(names: Sequence[str], multipliers: Iterable[float], digits: int = DIGITS) -> str:
    """What adds all LoRAs: one tag each, for a LoRA named twice counts differently in each host.

    Args:
        names: file stems of the LoRAs.
        multipliers: one per LoRA.
        digits: decimals.

    Raises:
        ValueError: as for `tag`, and for another number of multipliers than of names.
    """
    return " ".join(tag(name, x, digits) for name, x in zip(names, multipliers, strict=True))


def parse_tags(text: str) -> list[tuple[str, float]]:
    """Names and multipliers of all LoRA tags of a prompt, in its order; 1 where none is given.

    Raises:
        ValueError: a tag with more than one multiplier, or one that is not a plain number.
    """
    return [_parse(match[0], match[1]) for match in _TAG.finditer(text)]


def _parse(whole: str, inner: str) -> tuple[str, float]:
    name, *numbers = inner.split(":")
    if not numbers:
        return name, 1.0
    if len(numbers) > 1 or not _NUMBER.fullmatch(numbers[0]):
        raise ValueError(f"expected <lora:name:multiplier>, got {whole}")
    return name, float(numbers[0])
