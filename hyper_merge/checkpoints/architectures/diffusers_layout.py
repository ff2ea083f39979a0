"""Transformers in diffusers' layout, whose tensors are the checkpoint's under other names, or rows of them.

The tables of the families are the other way round what diffusers' `loaders/single_file_utils.py` does
with single-file checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

_NUMBERED: Final = re.compile(r"(\w+)\.(\d+)\.(.+)")
_ENDS: Final = (".weight", ".bias")


class _Place(NamedTuple):
    """Where a tensor belongs: a key of the checkpoint, and which of several parts of it this is."""

    key: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, eq=False)
class DiffusersLayout:
    """How diffusers stores the transformer of a family.

    Attributes:
        marks: With each of these some key begins. Among them are what stands first and last: of a model
            in several files, each of which has some blocks, no file has both.
        modules: diffusers' names by the checkpoint's, `#` for a block's number: several are parts of one
            matrix and of its bias, from the first row on.
        tensors: The same of whole keys, of what has no parts.
        same: What is called the same.
    """

    marks: tuple[str, ...]
    modules: Mapping[str, tuple[str, ...]]
    tensors: Mapping[str, str]
    same: str = r"(?!)"  # nothing

    def sources(self, keys: Iterable[str]) -> dict[str, tuple[str, ...]] | None:
        """Returns the file's keys, in the order of their rows, by the checkpoint's.

        Args:
            keys: of the transformer, without a prefix.

        Returns:
            None where this is not the layout of the file: a key is unknown, or a part or block missing.
        """
        keys = list(keys)
        if not all(any(key.startswith(mark) for key in keys) for mark in self.marks):
            return None
        found: dict[str, dict[int, str]] = {}
        counts: dict[str, int] = {}
        for key in keys:
            place = self._place(key)
            if place is None or place.part in found.setdefault(place.key, {}):
                return None
            found[place.key][place.part] = key
            counts[place.key] = place.parts
        if any(len(parts) < counts[key] for key, parts in found.items()) or _has_gaps(keys):
            return None
        return {key: tuple(parts[i] for i in sorted(parts)) for key, parts in found.items()}

    def _place(self, key: str) -> _Place | None:
        if key in self._places:
            return self._places[key]
        block = _NUMBERED.fullmatch(key)
        place = self._places.get(f"{block[1]}.#.{block[3]}") if block else None
        if place is not None and block is not None:
            return place._replace(key=place.key.replace("#", block[2]))
        return _Place(key) if re.fullmatch(self.same, key) else None

    @cached_property
    def _places(self) -> Mapping[str, _Place]:
        places = {name: _Place(key) for key, name in self.tensors.items()}
        for stem, names in self.modules.items():
            for part, name in enumerate(names):
                for end in _ENDS:
                    places[name + end] = _Place(stem + end, part, len(names))
        return places


def _has_gaps(keys: Iterable[str]) -> bool:
    """Tells whether blocks of a kind do not count from 0 on without a gap."""
    numbers: dict[str, set[int]] = {}
    for key in keys:
        block = _NUMBERED.fullmatch(key)
        if block and block[1].endswith(("blocks", "layers", "refiner")):
            numbers.setdefault(block[1], set()).add(int(block[2]))
    return any(max(found) >= len(found) for found in numbers.values())
