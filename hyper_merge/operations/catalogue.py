"""Remembers the facts about the files of a list, so that each is inspected once until it changes."""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

from hyper_merge.errors import CheckpointError
from hyper_merge.operations.inspect import InspectedFile, inspect_header, vae_fingerprint

_MOST: Final = 4096  # files; a few hundred bytes each
_Fact = TypeVar("_Fact")

_Stamp = tuple[int, int]  # size in bytes, time of change in nanoseconds


class Catalogue:
    """The known facts about files; any thread may use it."""

    def __init__(self) -> None:
        """Begins with none."""
        self._files: dict[Path, tuple[_Stamp, InspectedFile]] = {}
        self._vaes: dict[Path, tuple[_Stamp, str | None]] = {}

    def known(self, path: Path, status: os.stat_result) -> InspectedFile | None:
        """Returns what is known of a file without reading it; None where that is nothing.

        Args:
            path: the file.
            status: its size and time of change as they are now.
        """
        stamp, file = self._files.get(path, (None, None))
        if file is None or stamp != _stamp(status):
            return None
        stamp, vae = self._vaes.get(path, (None, None))
        return replace(file, vae=vae) if stamp == _stamp(status) else file

    def inspect(self, path: Path, status: os.stat_result) -> InspectedFile:
        """Returns the facts that the file's header tells; reads it if it is new or has changed."""
        file = self.known(path, status)
        if file is None:
            file = inspect_header(path)
            _remember(self._files, path, (_stamp(status), file))
        return file

    def knows_vae(self, path: Path, status: os.stat_result) -> bool:
        """Tells whether the file's VAE has been told apart from others."""
        return self._vaes.get(path, (None, None))[0] == _stamp(status)

    def inspect_vae(self, path: Path, status: os.stat_result) -> None:
        """Reads the small tensors of the file's VAE, from then on part of the facts."""
        try:
            vae = vae_fingerprint(path)
        except CheckpointError:  # its facts say why it cannot be merged
            vae = None
        _remember(self._vaes, path, (_stamp(status), vae))


@functools.cache
def process_catalogue() -> Catalogue:
    """Returns the catalogue of this process: it lives on when the host builds its pages again."""
    return Catalogue()


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_size, status.st_mtime_ns


def _remember(
    facts: dict[Path, tuple[_Stamp, _Fact]], path: Path, fact: tuple[_Stamp, _Fact]
) -> None:
    """Keeps a fact; forgets the oldest one where there are too many."""
    if len(facts) >= _MOST:
        facts.pop(next(iter(facts)), None)
    facts[path] = fact
