"""Formats multipliers as prompt tags, and parses them; text only, no files."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import repeat
from typing import Final, NamedTuple

from hyper_merge.runtime.names import distinct_words

DIGITS: Final = 5
"""Decimals of a multiplier in a prompt: it is off by 5e-6 at most."""

_TAG: Final = re.compile(r"<lora:([^>]*)>")
_SPACED_TAG: Final = re.compile(r"[ \t]*<lora:([^>]*)>")
_NAME: Final = re.compile(r"[^:<>=\n]+")  # what a host's parser takes for one name
_NUMBER: Final = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)\s*")


class Tag(NamedTuple):
    """One LoRA in a prompt."""

    name: str
    multiplier: float  # of the UNet
    text_multiplier: float  # of the text encoder


def lora_names(name: str, ranks: Sequence[int]) -> tuple[str, ...]:
    """Returns the file stems of the LoRAs, which are also their names in prompts.

    >>> lora_names("mix", [128, 64])
    ('mix_0-128', 'mix_1-64')
    """
    return tuple(f"{name}_{index}-{rank}" for index, rank in enumerate(ranks))


def companion_names(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the file stems of the LoRAs' companions.

    >>> companion_names(["mix_0-128"])
    ('mix_0-128-exact',)
    """
    return tuple(f"{name}-exact" for name in names)


def private_names(name: str, checkpoints: Sequence[str], ranks: Mapping[int, int]) -> list[str]:
    """Returns the file stems of private LoRAs, which are distinct even without case.

    >>> private_names("mix", ["a", "b"], {1: 16})
    ['mix_top-b-16']

    Args:
        name: first part of all names.
        checkpoints: file stems of all checkpoints.
        ranks: of the private LoRAs, by the checkpoint's place.
    """
    words = distinct_words(checkpoints)
    return [f"{name}_top-{words[place]}-{rank}" for place, rank in ranks.items()]


def format_tag(name: str, multiplier: float, text_multiplier: float | None = None) -> str:
    """Returns the tag that adds one LoRA in a prompt.

    Args:
        name: the LoRA's file stem.
        multiplier: any finite number.
        text_multiplier: of the text encoder; None where it is the same.

    Raises:
        ValueError: a name that prompts cannot hold, or a multiplier that is not finite.

    >>> format_tag("mix_0-128", 0.91234567)
    '<lora:mix_0-128:0.91235>'
    >>> format_tag("mix_0-128", 0.91234567, -0.5)
    '<lora:mix_0-128:-0.50000:0.91235>'
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"expected a name without : < > = and line breaks, got {name!r}")
    numbers = (multiplier,) if text_multiplier is None else (text_multiplier, multiplier)
    return f"<lora:{name}:{':'.join(_number(name, x) for x in numbers)}>"


def format_tags(
    names: Sequence[str],
    multipliers: Iterable[float],
    text_multipliers: Iterable[float] = (),
) -> str:
    """Returns the tags that add all LoRAs but those whose multipliers are exactly 0.

    There is one tag each, since hosts differ in how a LoRA that is named twice counts.

    Args:
        names: file stems of the LoRAs.
        multipliers: one per LoRA.
        text_multipliers: the text encoder's, one per LoRA; none where it takes the same.

    Raises:
        ValueError: a name that prompts cannot hold, a multiplier that is not finite, or another
            number of multipliers than of names.
    """
    texts = list(text_multipliers)
    rows = zip(names, multipliers, texts or repeat(None, len(names)), strict=True)
    return " ".join(format_tag(name, x, text) for name, x, text in rows if x or text)


def parse_tags(text: str) -> list[Tag]:
    """Returns all LoRA tags of a prompt, in its order; a missing multiplier is 1.

    Raises:
        ValueError: a tag with more than two multipliers, or one that is not a plain number.
    """
    return [_parse(match[0], match[1]) for match in _TAG.finditer(text)]


def tag_names(text: str) -> set[str]:
    """Returns the names of the LoRAs in a prompt, however their multipliers are written.

    >>> tag_names("a cat <lora:mix_0-128:unet=1>")
    {'mix_0-128'}
    """
    return {match[1].partition(":")[0] for match in _TAG.finditer(text)}


def without_loras(text: str, names: Container[str]) -> str:
    """Returns a prompt without the tags of some LoRAs, and otherwise as it is.

    >>> without_loras("a cat <lora:mix_0-128:0.91235>, <lora:ink:1>", {"mix_0-128"})
    'a cat, <lora:ink:1>'
    """
    return _SPACED_TAG.sub(
        lambda match: "" if match[1].partition(":")[0] in names else match[0], text
    ).strip()


def remove_tags(text: str) -> str:
    """Returns a prompt without its LoRA tags.

    >>> remove_tags("a cat <lora:mix_0-128:0.91235>")
    'a cat'
    """
    return _TAG.sub("", text).strip()


def _number(name: str, multiplier: float) -> str:
    """Returns a fixed number of decimals: not all hosts' buttons understand an exponent."""
    rounded = round(float(multiplier), DIGITS) + 0.0  # -0.0 + 0.0 is 0.0
    text = f"{rounded:.{DIGITS}f}"
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"expected a finite multiplier for {name}, got {text}")
    return text


def _parse(whole: str, inner: str) -> Tag:
    name, *numbers = inner.split(":")
    if len(numbers) > 2 or not all(map(_NUMBER.fullmatch, numbers)):
        raise ValueError(f"expected <lora:name:multiplier> or <lora:name:te:unet>, got {whole}")
    first, last = (numbers[0], numbers[-1]) if numbers else ("1", "1")
    return Tag(name, float(last), float(first))
