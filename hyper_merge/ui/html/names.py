"""Shortens checkpoints' names for tables, with the whole name on hover; the picker's script does the same."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Final

_ENDING: Final = re.compile(r"\.(safetensors|ckpt|pt|pth)$", re.IGNORECASE)
_MARKS: Final = re.compile(r"(?<=[\s._/\\-])(?!$)")
_LONG: Final = re.compile(r"(\S{25,})")


def short_names(names: Sequence[str]) -> list[str]:
    """Returns names without folder, extension, and what all begin with, as far as whole words go.

    >>> short_names(["sd15/real_v1.safetensors", "sd15/real_v2.ckpt"])
    ['v1', 'v2']
    >>> short_names(["real.safetensors", "realistic.safetensors"])
    ['real', 'realistic']
    """
    stems = [_ENDING.sub("", re.split(r"[/\\]", name)[-1]) for name in names]
    first, last = (min(stems), max(stems)) if len(stems) > 1 else ("", "")
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))))
    end = max((match.end() for match in re.finditer(r"[\s._-]", first[:same])), default=0)
    rests = [stem[end:] for stem in stems]
    return rests if all(rests) and len(set(rests)) == len(rests) else stems


def format_names(names: Sequence[str]) -> list[str]:
    """Returns the short names in HTML: broken behind their own marks only, the whole ones on hover."""
    return [
        f'<span class=hm-name title="{html.escape(whole)}">{_with_breaks(short)}</span>'
        for whole, short in zip(names, short_names(names), strict=True)
    ]


def format_text(text: str) -> str:
    """Returns a text in HTML whose long names and paths are broken behind their own marks only.

    >>> format_text("a_b and a_checkpoint_with_a_long_name")
    'a_b and a_<wbr>checkpoint_<wbr>with_<wbr>a_<wbr>long_<wbr>name'
    """
    parts = _LONG.split(text)  # every second one is a long word
    return "".join(_with_breaks(x) if i % 2 else html.escape(x) for i, x in enumerate(parts))


def _with_breaks(name: str) -> str:
    return "<wbr>".join(html.escape(part) for part in _MARKS.split(name))
