"""From a value as YAML or the command line has it to a checked setting; no files, no table.

Every parser takes its own results unchanged, and raises `RecipeError` with "expected ..., got ...";
the place is added by who knows it.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hyper_merge.errors import RecipeError
from hyper_merge.runtime.names import is_reserved

T = TypeVar("T")

MOST_BLOCKS = 64
LARGEST_RANK = 4096
LONGEST_NAME = 100

_LARGEST = sys.float_info.max
_WHOLE = re.compile(r"[-+]?[0-9]{1,30}")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_SIZE = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*([kmg]i?)?b?", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SHARE = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*%")
_WORDS: tuple[tuple[frozenset[str], bool | None], ...] = (
    (frozenset({"", "~", "null"}), None),
    (frozenset({"true", "yes", "on"}), True),
    (frozenset({"false", "no", "off"}), False),
)


@dataclass(frozen=True)
class PrivateLoraTarget:
    """How far a private LoRA is to go: a rank in all layers, or a share with what that takes.

    Attributes:
        rank: Of every layer; None for a share.
        share: Fraction 0..1 of the differences that is to be explained in all; None for a rank.
    """

    rank: int | None = None
    share: float | None = None

    def __str__(self) -> str:
        return f"{self.rank}" if self.share is None else f"{self.share * 100:.12g}%"


def plain_value(text: str) -> object:
    """What an unquoted word means: nothing, true or false, a number, or else the text itself.

    Differs from YAML 1.1 where that surprises: `5e-4` is a number, `010` is ten, `1:30` is text.
    """
    word = text.strip()
    for words, value in _WORDS:
        if word.lower() in words:
            return value
    if _WHOLE.fullmatch(word):
        return int(word)
    return float(word) if _NUMBER.fullmatch(word) else word


def describe_value(value: object) -> str:
    """`value` in the user's words, for "expected ..., got ..."."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"the yes/no value {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, dict):
        return "a mapping"
    text = str(value)
    shown = text[:60] + "..." if len(text) > 60 else text
    return '"' + "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown) + '"'


def suggest_nearest(word: object, known: Iterable[str]) -> str:
    """Advice with the known word nearest to `word`, after a semicolon; or nothing."""
    close = difflib.get_close_matches(str(word).lower(), list(known), n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""


def parse_text(value: object) -> str:
    """A text that says something; a path counts as its text."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bool | int | float):
        raise RecipeError(f"expected text, got {describe_value(value)}; put quotes around it")
    if not isinstance(value, str):
        raise RecipeError(f"expected text, got {describe_value(value)}")
    if not value.strip() or "\0" in value:
        raise RecipeError("expected text, got only blanks, or a zero byte in it")
    return value


def parse_path(value: object) -> Path:
    """A path; whether it exists is seen later."""
    return Path(parse_text(value))


def parse_name(value: object) -> str:
    """A name that is a file name everywhere and that prompts can hold.

    `contract.md` section 3: hosts cut or misread `<lora:NAME:1>` at other characters, `__x__` is a
    wildcard and `none` means no LoRA. A LoRA is called NAME_0-128, hence no underscore at the end.
    """
    name = parse_text(value)
    bad = re.search(r"[^A-Za-z0-9._ +-]", name)
    if bad:
        kind = "path separator" if bad[0] in "/\\" else "character"
        raise RecipeError(
            f"the {kind} {describe_value(bad[0])} is not allowed (character {bad.start() + 1} of "
            f"{describe_value(name)}); allowed are A-Z a-z 0-9 . _ + - and blanks inside"
        )
    refusal = _name_refusal(name)
    if refusal:
        raise RecipeError(f"{refusal}, got {describe_value(name)}; choose another name")
    return name


def _name_refusal(name: str) -> str | None:
    if name != name.strip():
        return "expected a name without a blank at its start or end"
    if name.startswith(".") or name.endswith("."):
        return "expected a name without a dot at its start or end"
    if "__" in name or name.endswith("_"):
        return 'expected a name without "__" (a wildcard to prompts) and without "_" at its end'
    if name.lower() == "none" or is_reserved(name):
        return "expected a name that is not reserved by the hosts or by Windows"
    if len(name) > LONGEST_NAME:
        return f"expected a name of at most {LONGEST_NAME} characters ({len(name)} here)"
    return None


def parse_models(value: object) -> tuple[Path, ...]:
    """The paths of two checkpoints or more."""
    if not isinstance(value, list | tuple):
        raise RecipeError(f"expected a list of paths, got {describe_value(value)}")
    paths = _each(value, parse_path)
    if len(paths) < 2:
        raise RecipeError(
            f"Fewer than two checkpoints: expected 2 paths or more, got {len(paths)}; "
            "add the files that are to be merged"
        )
    return paths


def parse_ranks(value: object) -> tuple[int, ...]:
    """One whole rank per LoRA, from a list or from a text such as "128, 64"."""
    listed = _listed(value, "whole numbers, such as 128, 64, 32, 16")
    ranks = _each(listed, whole(1, LARGEST_RANK))
    if not 1 <= len(ranks) <= MOST_BLOCKS:
        count = len(ranks) or "none"
        raise RecipeError(f"expected 1 to {MOST_BLOCKS} ranks, one per LoRA, got {count}")
    return ranks


def parse_weights(value: object) -> tuple[float, ...] | None:
    """One weight per checkpoint, not all zero; None for equal weights."""
    if value is None:
        return None
    weights = _each(_listed(value, "numbers, one per checkpoint"), number(0.0, math.inf))
    if not 0 < sum(weights) < math.inf:
        raise RecipeError(f"expected weights with a sum above 0, got the sum {sum(weights):g}")
    return weights


def parse_bytes(value: object) -> int | None:
    """A size such as "300MB" or "1.5 GB", or a number of bytes; None for none."""
    if value is None:
        return None
    match = _SIZE.fullmatch(str(value).strip()) if not isinstance(value, bool) else None
    size = float(match[1]) * _UNITS[(match[2] or "").lower()] if match else 0.0
    if not 0.5 < size <= _LARGEST:
        raise RecipeError(
            f'expected a size, such as "300MB" or "1.5GB", got {describe_value(value)}'
        )
    return round(size)


def parse_share(value: object) -> float | None:
    """A share such as "95%" or 0.95, above 0 and at most 1; None for none."""
    if value is None:
        return None
    match = _SHARE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match:
        value = float(match[1]) / 100
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise RecipeError(f'expected a share, such as "95%" or 0.95, got {describe_value(value)}')
    return float(value)


def _listed(value: object, what: str) -> Sequence[object]:
    """`value` as a list: itself, a text taken apart at commas and blanks, or a lone number."""
    if isinstance(value, str):
        text = value.strip().removeprefix("[").removesuffix("]").strip()
        return [plain_value(part) for part in re.split(r"\s*,\s*|\s+", text)] if text else []
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [value]
    raise RecipeError(f"expected a list of {what}, got {describe_value(value)}")


def _each(values: Sequence[object], parse: Callable[[object], T]) -> tuple[T, ...]:
    return tuple(_item(position, value, parse) for position, value in enumerate(values, start=1))


def _item(position: int, value: object, parse: Callable[[object], T]) -> T:
    try:
        return parse(value)
    except RecipeError as error:
        raise RecipeError(f"item {position}: {error}") from None


def parse_flag(value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise RecipeError(f"expected true or false, got {describe_value(value)}")
    return value


def parse_device(value: object) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:N`; whether it is there is seen later."""
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", value):
        advice = suggest_nearest(value, ("auto", "cpu", "cuda"))
        raise RecipeError(
            f"expected auto, cpu, cuda or cuda:N, got {describe_value(value)}{advice}"
        )
    return value


def choice(*words: str) -> Callable[[object], str]:
    """A parser for one of `words`."""

    def parse(value: object) -> str:
        if not isinstance(value, str) or value not in words:
            known = ", ".join(words)
            raise RecipeError(
                f"expected one of {known}, got {describe_value(value)}{suggest_nearest(value, words)}"
            )
        return value

    return parse


def whole(low: int, high: int) -> Callable[[object], int]:
    """A parser for a whole number in `low..high`."""

    def parse(value: object) -> int:
        # bool is an int to Python, not to the user
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise RecipeError(
                f"expected a whole number from {low} to {high}, got {describe_value(value)}"
            )
        return value

    return parse


def number(low: float, high: float) -> Callable[[object], float]:
    """A parser for a finite number in `low..high`."""
    span = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of {low:g} or more"

    def parse(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RecipeError(f"expected a number {span}, got {describe_value(value)}")
        # By comparison: a whole number of hundreds of digits is no float, not even infinity.
        if not -_LARGEST <= value <= _LARGEST or not low <= value <= high:
            raise RecipeError(f"expected a number {span}, got {describe_value(value)}")
        return float(value)

    return parse


def parse_private_lora_target(value: object) -> PrivateLoraTarget | None:
    """A rank such as `16`, or a share such as `95%`; None for nothing."""
    if value is None or isinstance(value, PrivateLoraTarget):
        return value
    try:
        if str(value).strip().endswith("%"):
            share = parse_share(value)
            if share is not None and share < 1:
                return PrivateLoraTarget(share=share)
        return PrivateLoraTarget(rank=whole(1, LARGEST_RANK)(plain_value(str(value))))
    except RecipeError:
        raise RecipeError(
            f"expected a rank from 1 to {LARGEST_RANK}, or a share above 0% and below 100%, such as"
            f" 16 or 95%, got {describe_value(value)}"
        ) from None
