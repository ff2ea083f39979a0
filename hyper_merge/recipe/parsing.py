"""Parsers of single settings, from a value as YAML or the command line has it; no files, no table.

Every parser takes its own results unchanged, and raises `RecipeError` with "expected ..., got ...";
`settings_placed` adds the setting and its place.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeGuard, TypeVar

from hyper_merge.errors import RecipeError
from hyper_merge.recipe.default_ranks import RANK_WORDS, RankWord
from hyper_merge.recipe.plain_values import (
    describe_value,
    expected_error,
    plain_value,
    suggest_nearest,
)
from hyper_merge.runtime.names import is_reserved

T = TypeVar("T")

MOST_BLOCKS = 64
LARGEST_RANK = 4096
LONGEST_NAME = 100

_SMALLEST = 1000  # bytes
_LARGEST = sys.float_info.max
_SIZE = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*([kmg]i?)?b?", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SHARE = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*%")


@dataclass(frozen=True)
class PrivateLoraTarget:
    """The size of a private LoRA: one rank in all layers, or whatever rank a share takes.

    Attributes:
        rank: Rank in every layer; None where a share is given.
        share: Fraction 0..1 of the differences that is to be explained in all; None where a rank is
            given.
    """

    rank: int | None = None
    share: float | None = None

    def __str__(self) -> str:
        return f"{self.rank}" if self.share is None else f"{self.share * 100:.12g}%"


def parse_text(value: object) -> str:
    """Returns a text that is not blank; a path counts as its text."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bool | int | float):
        raise expected_error("text", value, hint="put quotes around it")
    if not isinstance(value, str):
        raise expected_error("text", value)
    if not value.strip() or "\0" in value:
        raise RecipeError("expected text, got only blanks, or a zero byte in it")
    return value


def parse_path(value: object) -> Path:
    """Returns a path; whether it exists is checked later."""
    return Path(parse_text(value))


def parse_name(value: object) -> str:
    """Returns a name that every file system takes as a file name, and that prompts can hold.

    Hosts cut or misread `<lora:NAME:1>` at other characters, `__x__` is a wildcard and `none` means
    no LoRA. A LoRA is called NAME_0-128, hence no underscore at the end.
    """
    name = parse_text(value)
    bad = re.search(r"[^A-Za-z0-9._ +-]", name)
    if bad:
        kind = "path separator" if bad[0] in "/\\" else "character"
        raise RecipeError(
            f"the {kind} {describe_value(bad[0])} is not allowed (character {bad.start() + 1} of"
            f" {describe_value(name)})",
            hint="allowed are A-Z a-z 0-9 . _ + - and blanks inside",
        )
    expectation = _expected_name(name)
    if expectation:
        raise expected_error(expectation, name, hint="choose another name")
    return name


def _expected_name(name: str) -> str | None:
    if name != name.strip():
        return "a name without a blank at its start or end"
    if name.startswith(".") or name.endswith("."):
        return "a name without a dot at its start or end"
    if "__" in name or name.endswith("_"):
        return 'a name without "__" (a wildcard to prompts) and without "_" at its end'
    if name.lower() == "none" or is_reserved(name):
        return "a name that is not reserved by the hosts or by Windows"
    if len(name) > LONGEST_NAME:
        return f"a name of at most {LONGEST_NAME} characters ({len(name)} here)"
    return None


def parse_models(value: object) -> tuple[Path, ...]:
    """Returns the paths of two checkpoints or more."""
    paths = parse_paths(value)
    if len(paths) < 2:
        raise RecipeError(
            f"Fewer than two checkpoints: expected 2 paths or more, got {len(paths)}",
            hint="add the files that are to be merged",
        )
    return paths


def parse_paths(value: object) -> tuple[Path, ...]:
    """Returns the paths of a list of any length."""
    if not isinstance(value, list | tuple):
        raise expected_error("a list of paths", value)
    return parse_items(value, parse_path)


def parse_ranks(value: object) -> tuple[int, ...] | RankWord:
    """Returns one whole rank per LoRA, from a list or from a text such as "128, 64"; or a word for them."""
    contents = f"whole numbers, such as 128, 64, 32, 16, or {', '.join(RANK_WORDS)}"
    items = _split_list(value, contents)
    if len(items) == 1 and isinstance(items[0], str):
        word = next((word for word in RANK_WORDS if word == items[0].lower()), None)
        if word is None:
            raise expected_error(f"a list of {contents}", items[0])
        return word
    ranks = parse_items(items, whole(1, LARGEST_RANK))
    if not 1 <= len(ranks) <= MOST_BLOCKS:
        count = len(ranks) or "none"
        raise RecipeError(f"expected 1 to {MOST_BLOCKS} ranks, one per LoRA, got {count}")
    return ranks


def parse_weights(value: object) -> tuple[float, ...] | None:
    """Returns one weight per checkpoint, not all zero; None for equal weights."""
    if value is None:
        return None
    items = _split_list(value, "numbers, one per checkpoint")
    weights = parse_items(items, number(0.0, math.inf))
    if not 0 < sum(weights) < math.inf:
        raise RecipeError(f"expected weights with a sum above 0, got the sum {sum(weights):g}")
    return weights


def parse_multipliers(value: object) -> tuple[float, ...]:
    """Returns finite numbers, one per LoRA, from a list or from a text such as "1, -0.5"."""
    items = _split_list(value, "numbers, one per LoRA")
    return parse_items(items, number(-_LARGEST, _LARGEST))


def parse_bytes(value: object) -> int | None:
    """Returns bytes, from a number or a text such as "300MB" or "1.5 GB"; None for nothing.

    A size below a kilobyte is refused: no LoRA is that small, and its unit was forgotten.
    """
    if value is None:
        return None
    match = _SIZE.fullmatch(str(value).strip()) if not isinstance(value, bool) else None
    size = float(match[1]) * _UNITS[(match[2] or "").lower()] if match else 0.0
    if not 0.5 < size <= _LARGEST:
        raise expected_error('a size, such as "300MB" or "1.5GB"', value)
    if match and round(size) < _SMALLEST:
        hint = "" if match[2] else f"did you mean {match[1]}MB?"
        raise expected_error('a size of 1kB or more, such as "300MB"', value, hint=hint)
    return round(size)


def parse_share(value: object) -> float | None:
    """Returns a share above 0 and up to 1, from "95%" or 0.95; None for nothing."""
    if value is None:
        return None
    match = _SHARE.fullmatch(value.strip()) if isinstance(value, str) else None
    share = float(match[1]) / 100 if match else value
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise expected_error('a share, such as "95%" or 0.95', value)
    return float(share)


def parse_words(value: object) -> tuple[str, ...]:
    """Returns the texts of a list of any length."""
    if not isinstance(value, list | tuple):
        raise expected_error("a list of words", value)
    return parse_items(value, parse_text)


def _split_list(value: object, contents: str) -> Sequence[object]:
    """Returns the items of a list, of a text that is cut at commas and blanks, or a lone number."""
    if isinstance(value, str):
        text = value.strip().removeprefix("[").removesuffix("]").strip()
        return [plain_value(part) for part in re.split(r"\s*,\s*|\s+", text)] if text else []
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [value]
    raise expected_error(f"a list of {contents}", value)


def parse_items(values: Sequence[object], parse: Callable[[object], T]) -> tuple[T, ...]:
    """Returns every parsed item; a refusal says which one it is of."""
    return tuple(_parse_item(position, value, parse) for position, value in enumerate(values, 1))


def _parse_item(position: int, value: object, parse: Callable[[object], T]) -> T:
    try:
        return parse(value)
    except RecipeError as error:
        error.message = f"item {position}: {error.message}"
        raise


def parse_flag(value: object) -> bool:
    """Returns true or false."""
    if not isinstance(value, bool):
        raise expected_error("true or false", value)
    return value


def parse_device(value: object) -> str:
    """Returns `auto`, `cpu`, `cuda` or `cuda:N`; whether it is there is checked later."""
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", value):
        hint = suggest_nearest(value, ("auto", "cpu", "cuda"))
        raise expected_error("auto, cpu, cuda or cuda:N", value, hint)
    return value


def choice(*words: str) -> Callable[[object], str]:
    """Returns a parser for one of `words`."""

    def parse(value: object) -> str:
        if not isinstance(value, str) or value not in words:
            expectation = f"one of {', '.join(words)}"
            raise expected_error(expectation, value, suggest_nearest(value, words))
        return value

    return parse


def whole(low: int, high: int) -> Callable[[object], int]:
    """Returns a parser for a whole number in `low..high`."""

    def parse(value: object) -> int:
        if not _is_whole(value, low, high):
            raise expected_error(f"a whole number from {low} to {high}", value)
        return value

    return parse


def whole_or_auto(low: int, high: int) -> Callable[[object], int | Literal["auto"]]:
    """Returns a parser for a whole number in `low..high`, or `auto`."""

    def parse(value: object) -> int | Literal["auto"]:
        if value == "auto":
            return "auto"
        if not _is_whole(value, low, high):
            raise expected_error(f"auto, or a whole number from {low} to {high}", value)
        return value

    return parse


def _is_whole(value: object, low: int, high: int) -> TypeGuard[int]:
    # bool is an int to Python, not to the user
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def number(low: float, high: float) -> Callable[[object], float]:
    """Returns a parser for a finite number in `low..high`."""
    span = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of {low:g} or more"

    def parse(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise expected_error(f"a number {span}", value)
        # By comparison: a whole number of hundreds of digits is no float, not even infinity.
        if not -_LARGEST <= value <= _LARGEST or not low <= value <= high:
            raise expected_error(f"a number {span}", value)
        return float(value)

    return parse


def parse_private_lora_target(value: object) -> PrivateLoraTarget | None:
    """Returns a target from a rank such as `16` or a share such as `95%`; None for nothing."""
    if value is None or isinstance(value, PrivateLoraTarget):
        return value
    try:
        if str(value).strip().endswith("%"):
            share = parse_share(value)
            if share is not None and share < 1:
                return PrivateLoraTarget(share=share)
        return PrivateLoraTarget(rank=whole(1, LARGEST_RANK)(plain_value(str(value))))
    except RecipeError:
        raise expected_error(
            f"a rank from 1 to {LARGEST_RANK}, or a share above 0% and below 100%, such as"
            " 16 or 95%",
            value,
        ) from None


def optional(parse: Callable[[object], T]) -> Callable[[object], T | None]:
    """Returns a parser that takes nothing too, as None."""
    return lambda value: None if value is None else parse(value)
