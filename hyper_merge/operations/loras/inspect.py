"""Tells what LoRA files are, by their headers alone, and remembers it until a file changes."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import HyperMergeError
from hyper_merge.loras.metadata import KIND
from hyper_merge.operations.loras.inputs import recognise

_MOST: Final = 4096  # files; a few hundred bytes each
_Stamp = tuple[int, int]  # size in bytes, time of change in nanoseconds


@dataclass(frozen=True)
class InspectedLora:
    """The facts about one LoRA, as a table shows them."""

    family: str = ""  # its title, "SD 1.x"; empty where it is unknown
    rank: int = 0  # the most that a layer has
    problem: str = ""  # why it cannot be used; empty where it can
    is_made: bool = False  # whether Hyper-Merge made it


def inspect_lora(path: Path) -> InspectedLora:
    """Returns the facts about a file; if it cannot be used, its `problem` says why."""
    is_made = False
    try:
        header = read_header(path)
        is_made = KIND in header.metadata
        known, modules = recognise(header)
    except HyperMergeError as error:
        return InspectedLora(problem=str(error), is_made=is_made)
    rank = max(part.shape.rank for part in modules.parts)
    return InspectedLora(known.family.title, rank, is_made=is_made)


class LoraCatalogue:
    """The known facts about LoRAs; any thread may use it."""

    def __init__(self) -> None:
        """Begins with none."""
        self._files: dict[Path, tuple[_Stamp, InspectedLora]] = {}

    def known(self, path: Path, status: os.stat_result) -> InspectedLora | None:
        """Returns what is known of a file without reading it; None where that is nothing.

        Args:
            path: the file.
            status: its size and time of change as they are now.
        """
        stamp, file = self._files.get(path, (None, None))
        return file if stamp == _stamp(status) else None

    def inspect(self, path: Path, status: os.stat_result) -> InspectedLora:
        """Returns the facts about a file; reads its header if it is new or has changed."""
        file = self.known(path, status)
        if file is None:
            file = inspect_lora(path)
            if len(self._files) >= _MOST:
                self._files.pop(next(iter(self._files)), None)
            self._files[path] = _stamp(status), file
        return file


@functools.cache
def process_lora_catalogue() -> LoraCatalogue:
    """Returns the catalogue of this process: it lives on when the host builds its pages again."""
    return LoraCatalogue()


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_size, status.st_mtime_ns
