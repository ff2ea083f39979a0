"""Finds the checkpoints that a run was made of, and tells whether they were changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import CheckpointError
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.hash_cache import find_by_hash, hash_sources
from hyper_merge.runs.manifest import RunSource
from hyper_merge.runs.paths import path_exists
from hyper_merge.runtime.progress import Progress

SourceState = Literal["there", "changed", "missing"]


@dataclass(frozen=True)
class LocatedSource:
    """A checkpoint that went into a run, as it is found now."""

    source: RunSource
    state: SourceState
    path: Path  # where it is, or was

    @property
    def stem(self) -> str:
        """The name by which the run's multipliers are listed."""
        return Path(self.source.name).stem


def locate_sources(
    sources: Sequence[RunSource], folders: Folders, progress: Progress
) -> tuple[LocatedSource, ...]:
    """Returns checkpoints in their order, recognized by their hashes.

    One that was moved is found by its name among the checkpoints, or by a hash that is remembered.

    Args:
        sources: of a run, or of its fits.
        folders: with the checkpoints, and the hashes of the cache.
        progress: progress and interrupt; files whose hashes are not known are read.
    """
    parts = progress.split([1.0] * len(sources))
    return tuple(_find(source, folders, part) for source, part in zip(sources, parts, strict=True))


def _find(source: RunSource, folders: Folders, progress: Progress) -> LocatedSource:
    for path in _places(source, folders):
        try:
            header = read_header(path)
            (record,) = hash_sources([header], folders.cache, progress)
        except CheckpointError:
            continue  # not a checkpoint any more
        if record.sha256 == source.sha256:
            return LocatedSource(source, "there", path)
    return LocatedSource(source, "changed" if path_exists(source.path) else "missing", source.path)


def _places(source: RunSource, folders: Folders) -> Iterator[Path]:
    """Yields the paths where a checkpoint may be, the likely ones first, every path once."""
    candidates = (
        source.path,
        folders.models / source.name,
        *find_by_hash(source.sha256, folders.cache),
    )
    yield from (path for path in dict.fromkeys(candidates) if path_exists(path))
