"""Makes names from other names: valid on every file system, and distinct from one another.

File systems of Windows and macOS do not distinguish `A` from `a`, nor two encodings of one accented
letter; names are compared like that everywhere, since models folders move between systems.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Container, Sequence
from typing import Final

LONGEST_WORD: Final = 60
"""Bytes of a checkpoint's name, in UTF-8, within the name of a LoRA."""

_FALLBACK: Final = "checkpoint"
_FORBIDDEN: Final = re.compile(r'[\x00-\x1f\x7f-\x9f\ud800-\udfff<>:"/\\|?*]+')  # by some system
_RESERVED: Final = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³]) *(\..*)?", re.IGNORECASE
)


def name_key(name: str) -> str:
    """Returns a key that is equal for names which some file system does not distinguish.

    >>> name_key("Mix.safetensors") == name_key("mix.SAFETENSORS. ")
    True
    """
    folded = unicodedata.normalize("NFD", name).casefold()
    return unicodedata.normalize("NFC", folded).rstrip(" .")


def is_reserved(name: str) -> bool:
    """Returns whether Windows takes a name, with or without a suffix, for a device."""
    return _RESERVED.fullmatch(name) is not None


def file_stem(text: str, longest: int = 200) -> str:
    """Returns a text as a file name, without suffix, that every system takes.

    Args:
        text: any text.
        longest: limit of the name in bytes.

    >>> file_stem("My Model [v2]: 1/2")
    'My Model [v2]- 1-2'
    """
    plain = _FORBIDDEN.sub("-", unicodedata.normalize("NFC", text))
    return _whole(_cut(plain, longest).lstrip(" ").rstrip(" ."))


def prompt_word(text: str, longest: int = 100) -> str:
    """Returns a text as part of a LoRA's name: characters that prompts or file systems misread go.

    Letters of all scripts stay: every host takes them.

    Args:
        text: any text.
        longest: limit of the word in bytes.

    >>> prompt_word("My Model [v2]__final")
    'My Model -v2-_final'
    """
    letters = unicodedata.normalize("NFC", text)
    plain = "".join(c if _is_plain(c) else "\0" for c in letters)
    plain = re.sub(r"_{2,}", "_", re.sub("\0+", "-", plain))
    return _whole(_cut(plain, longest).strip(" ._-"))


def unique_name(name: str, is_taken: Callable[[str], bool]) -> str:
    """Returns the name, or the first of name-2, name-3, ... that is not taken.

    >>> unique_name("a", {"a", "a-2"}.__contains__)
    'a-3'
    """
    candidate, number = name, 1
    while is_taken(candidate):
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def distinct_words(
    texts: Sequence[str], longest: int = LONGEST_WORD, taken: Container[str] = ()
) -> tuple[str, ...]:
    """Returns a distinct prompt word for each text, in the texts' order; letter case is ignored.

    Texts that are prompt words already keep them; the others get a number where two would be equal.

    Args:
        texts: the names that words are made from.
        longest: limit of a word in bytes, without its number.
        taken: keys, by `name_key`, of words that are in use elsewhere.

    >>> distinct_words(["v2 (new)", "v2 [new]", "v2 -new"])
    ('v2 -new-2', 'v2 -new-3', 'v2 -new')
    """
    words = [prompt_word(text, longest) for text in texts]
    distinct: dict[int, str] = {}
    keys: set[str] = set()
    for place in sorted(range(len(texts)), key=lambda i: words[i] != texts[i]):
        word = unique_name(words[place], lambda w: name_key(w) in keys or name_key(w) in taken)
        distinct[place] = word
        keys.add(name_key(word))
    return tuple(distinct[place] for place in range(len(texts)))


def one_line(text: str) -> str:
    """Returns a name on one line of text: a character that does not print is written as its code.

    >>> one_line("a" + chr(9) + "b") == "a" + chr(92) + "tb"
    True
    """
    escaped = text.replace("\\", "\\\\")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in escaped)


def _is_plain(letter: str) -> bool:
    """Returns whether a letter has no special meaning in prompts and file systems."""
    if letter.isascii():
        return letter.isalnum() or letter in "._ +-"
    return letter.isalnum() or unicodedata.category(letter).startswith("M")  # vowel signs, accents


def _cut(text: str, longest: int) -> str:
    """Returns the beginning of a text, up to a number of bytes."""
    return text.encode(errors="ignore")[:longest].decode(errors="ignore")


def _whole(name: str) -> str:
    """Returns the name, or one that is neither empty nor reserved."""
    if not name:
        return _FALLBACK
    return f"{_FALLBACK}-{name}" if is_reserved(name) else name
