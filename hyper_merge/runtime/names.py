"""Names that are made of other names: what every file system takes, and none equal to another.

File systems of Windows and macOS do not tell `A` from `a`, nor two spellings of one accented letter;
names are compared like that everywhere, for models folders are moved between systems.
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
    """What two names have in common that some file system does not tell apart.

    >>> name_key("Mix.safetensors") == name_key("mix.SAFETENSORS. ")
    True
    """
    folded = unicodedata.normalize("NFD", name).casefold()
    return unicodedata.normalize("NFC", folded).rstrip(" .")


def is_reserved(name: str) -> bool:
    """Whether Windows takes a name, with or without a suffix, for a device."""
    return _RESERVED.fullmatch(name) is not None


def file_stem(text: str, longest: int = 200) -> str:
    """A text as a file's name without its suffix on every system; `longest` is in bytes.

    >>> file_stem("My Model [v2]: 1/2")
    'My Model [v2]- 1-2'
    """
    plain = _FORBIDDEN.sub("-", unicodedata.normalize("NFC", text))
    return _whole(_cut(plain, longest).lstrip(" ").rstrip(" ."))


def prompt_word(text: str, longest: int = 100) -> str:
    """A text as part of a LoRA's name, with what prompts and file systems misread replaced.

    Letters of all scripts stay: every host takes them. `longest` is in bytes.

    >>> prompt_word("My Model [v2]__final")
    'My Model -v2-_final'
    """
    letters = unicodedata.normalize("NFC", text)
    plain = "".join(c if _is_plain(c) else "\0" for c in letters)
    plain = re.sub(r"_{2,}", "_", re.sub("\0+", "-", plain))
    return _whole(_cut(plain, longest).strip(" ._-"))


def unique_name(wanted: str, is_taken: Callable[[str], bool]) -> str:
    """The wanted name, or the first of name-2, name-3, ... that is not taken.

    >>> unique_name("a", {"a", "a-2"}.__contains__)
    'a-3'
    """
    name, number = wanted, 1
    while is_taken(name):
        number += 1
        name = f"{wanted}-{number}"
    return name


def distinct_words(
    texts: Sequence[str], longest: int = LONGEST_WORD, taken: Container[str] = ()
) -> tuple[str, ...]:
    """A word of prompts for each text, in the texts' order; no two are equal, even without case.

    Texts that are such words themselves come first, so that it is the others that get a number.

    Args:
        texts: the names that words are made of.
        longest: bytes of a word, but for its number.
        taken: keys, by `name_key`, of words that belong to something else.

    >>> distinct_words(["v2 (new)", "v2 [new]", "v2 -new"])
    ('v2 -new-2', 'v2 -new-3', 'v2 -new')
    """
    words = [prompt_word(text, longest) for text in texts]
    found: dict[int, str] = {}
    given: set[str] = set()
    for place in sorted(range(len(texts)), key=lambda i: words[i] != texts[i]):
        word = unique_name(words[place], lambda w: name_key(w) in given or name_key(w) in taken)
        found[place] = word
        given.add(name_key(word))
    return tuple(found[place] for place in range(len(texts)))


def one_line(text: str) -> str:
    """A name as lines of text can hold it: a letter that does not print is written as its code.

    >>> one_line("a" + chr(9) + "b") == "a" + chr(92) + "tb"
    True
    """
    escaped = text.replace("\\", "\\\\")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in escaped)


def _is_plain(letter: str) -> bool:
    """Whether a letter means nothing to prompts and file systems."""
    if letter.isascii():
        return letter.isalnum() or letter in "._ +-"
    return letter.isalnum() or unicodedata.category(letter).startswith("M")  # vowel signs, accents


def _cut(text: str, longest: int) -> str:
    """The beginning of a text: file systems count bytes."""
    return text.encode(errors="ignore")[:longest].decode(errors="ignore")


def _whole(name: str) -> str:
    """The name, or one that says something and is not reserved."""
    if not name:
        return _FALLBACK
    return f"{_FALLBACK}-{name}" if is_reserved(name) else name
