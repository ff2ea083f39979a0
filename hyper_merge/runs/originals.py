"""The checkpoints that a run was made of: whether they are still what they were, and where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import CheckpointError
from hyper_merge.runs.folders import Folders, is_there
from hyper_merge.runs.hash_cache import hashed, remembered
from hyper_merge.runs.manifest import RunSource
from hyper_merge.runtime.progress import Control

State = Literal["there", "changed", "missing"]


@dataclass(frozen=True)
class Original:
    """A checkpoint that went into a run, as it is found now."""

    source: RunSource
    state: State
    path: Path  # where it is, or was

    @property
    def stem(self) -> str:
        """By which the run's multipliers are listed."""
        return Path(self.source.name).stem


def find_originals(
    sources: Sequence[RunSource], folders: Folders, control: Control
) -> tuple[Original, ...]:
    """Checkpoints in their order, told by their hashes.

    One that was moved is found by its name among the checkpoints, or by a hash that is remembered.

    Args:
        sources: of a run, or of its fits.
        folders: with the checkpoints, and the hashes of the cache.
        control: progress and interrupt; files whose hashes are not known are read.
    """
    parts = control.split([1.0] * len(sources))
    return tuple(_find(source, folders, part) for source, part in zip(sources, parts, strict=True))


def _find(source: RunSource, folders: Folders, control: Control) -> Original:
    for path in _places(source, folders):
        try:
            header = read_header(path)
            (found,) = hashed([header], folders.cache, control)
        except CheckpointError:
            continue  # not a checkpoint any more
        if found.sha256 == source.sha256:
            return Original(source, "there", path)
    return Original(source, "changed" if is_there(source.path) else "missing", source.path)


def _places(source: RunSource, folders: Folders) -> Iterator[Path]:
    """Where it may be, the likely ones first, each once."""
    candidates = (
        source.path,
        folders.models / source.name,
        *remembered(source.sha256, folders.cache),
    )
    yield from (path for path in dict.fromkeys(candidates) if is_there(path))
