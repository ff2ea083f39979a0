"""Plain values, as words of a YAML file or the command line mean them, and what messages call them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable
from typing import TypeVar

from hyper_merge.errors import HyperMergeError, RecipeError

_Error = TypeVar("_Error", bound=HyperMergeError)

_WHOLE = re.compile(r"[-+]?[0-9]{1,30}")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_WORDS: tuple[tuple[frozenset[str], bool | None], ...] = (
    (frozenset({"", "~", "null"}), None),
    (frozenset({"true", "yes", "on"}), True),
    (frozenset({"false", "no", "off"}), False),
)


def plain_value(text: str) -> object:
    """Returns what an unquoted word means: nothing, true or false, a number, or else its text.

    It differs from YAML 1.1 where that surprises: `5e-4` is a number, `010` is ten, `1:30` is text.
    """
    word = text.strip()
    for words, value in _WORDS:
        if word.lower() in words:
            return value
    if _WHOLE.fullmatch(word):
        return int(word)
    return float(word) if _NUMBER.fullmatch(word) else word


def describe_value(value: object) -> str:
    """Returns what a value is called in messages of the form "expected ..., got ..."."""
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
    text = text[:60] + "..." if len(text) > 60 else text
    return '"' + "".join(c if c.isprintable() else repr(c)[1:-1] for c in text) + '"'


def suggest_nearest(word: object, known: Iterable[str]) -> str:
    """Returns a hint with the known word nearest to `word`; empty where none is near."""
    close = difflib.get_close_matches(str(word).lower(), list(known), n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else ""


def unknown_word(
    kind: type[_Error], message: str, word: str, known: Collection[str], listing: str
) -> _Error:
    """Returns the refusal of a word that is none of those known.

    Args:
        kind: class of the error.
        message: says which word is unknown.
        word: the word.
        known: all words that could stand there.
        listing: the beginning of the sentence that lists them, such as "Known keys are".
    """
    nearest, listing = suggest_nearest(word, known), f"{listing} {', '.join(known)}"
    if nearest:
        return kind(message, hint=f"{nearest} {listing}")
    return kind(f"{message}. {listing}")


def expected_error(expectation: str, value: object, hint: str = "") -> RecipeError:
    """Returns the refusal of a value.

    Args:
        expectation: what could stand there, such as "a whole number from 1 to 64".
        value: what stands there.
        hint: what to do.
    """
    return RecipeError(f"expected {expectation}, got {describe_value(value)}", hint=hint)
