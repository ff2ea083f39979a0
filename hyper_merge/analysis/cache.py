"""The folder of analyses: finding one that serves, and keeping them within bounds.

One file per analysis, named after a hash of all that decides it, so that a changed checkpoint or
setting is never served an old one. Safe to delete at any time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hyper_merge.analysis.checksums import stem_of
from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.analysis.store import (
    SOLUTIONS,
    SUFFIX,
    analysis_identity,
    fault_of,
    solutions_path,
)
from hyper_merge.analysis.streaming_pass import PassOptions
from hyper_merge.checkpoints.io.atomic_file import as_output_error
from hyper_merge.errors import CacheError
from hyper_merge.runtime.damaged_files import SET_ASIDE, DamagedFiles


def required_width(ranks: Sequence[int]) -> int:
    """Columns of the bases of a new analysis: twice the ranks, and enough for most later lists."""
    return max(512, -(-2 * sum(ranks) // 256) * 256)


def is_wide_enough(width: int, ranks: Sequence[int]) -> bool:
    """Whether bases of this width are wide enough for a list of ranks.

    At 1.5 times the sum of the ranks the loss is under 1 % above that at twice the sum.
    """
    return width >= 1.5 * sum(ranks)


def analysis_path(folder: Path, inputs: MergeInputs, options: PassOptions) -> Path:
    """Where the analysis of these files, settings and width belongs."""
    return folder / f"{stem_of(analysis_identity(inputs, options.seed))}-{options.width}{SUFFIX}"


def place_for(
    folder: Path, inputs: MergeInputs, options: PassOptions, damaged: DamagedFiles
) -> Path:
    """Where a new analysis can be written: `analysis_path`, or beside a damaged one that cannot be moved."""
    path = analysis_path(folder, inputs, options)
    stem, number = path.name.partition("-")[0], 1
    while path in damaged and os.path.lexists(path):
        number += 1
        path = folder / f"{stem}-{number}-{options.width}{SUFFIX}"
    return path


def find_analysis(
    folder: Path,
    inputs: MergeInputs,
    options: PassOptions,
    ranks: Sequence[int],
    damaged: DamagedFiles | None = None,
) -> Path | None:
    """The narrowest analysis of these files that serves the ranks.

    Args:
        folder: of the cache.
        inputs: the files.
        options: the settings; a wider analysis than theirs serves too.
        ranks: the list that it is to serve.
        damaged: takes those that are damaged and names those to pass over; None to pass over all
            damaged ones and leave them where they are.
    """
    stem = analysis_path(folder, inputs, options).name.partition("-")[0]
    for path in sorted(folder.glob(f"{stem}-*{SUFFIX}"), key=lambda path: (_width(path), path)):
        width = _width(path)
        if not is_wide_enough(width, ranks) and width < (options.width or 1):
            continue
        if damaged is not None and path in damaged:
            continue
        fault = fault_of(path, inputs)
        if fault is None:
            return path
        if damaged is not None:
            damaged.take(path, fault)
    return None


def mark_used(path: Path) -> None:
    """Makes an analysis the most recently used one, for `prune`."""
    with as_output_error(path):
        os.utime(path)


def cache_bytes(folder: Path) -> int:
    """Bytes of all analyses in a cache folder, 0 if there is none; hashes of files do not count."""
    return sum(_size(path) for path in _files(folder))


def clear_analyses(folder: Path) -> int:
    """Deletes all analyses; the remembered hashes stay, for they are small and slow to make again.

    Returns:
        The bytes that were freed.

    Raises:
        CacheError: a file cannot be deleted; the others are.
    """
    stuck, freed = [], 0
    for path in _files(folder):
        size = _size(path)
        try:
            path.unlink(missing_ok=True)
            freed += size
        except OSError as error:
            stuck.append(f"{path}: {error.strerror or error}")
    if stuck:
        raise CacheError(
            f"part of the cache cannot be deleted (first: {stuck[0]})",
            hint="try again when no merge is running",
        )
    return freed


def prune_analyses(folder: Path, limit: int) -> None:
    """Deletes the analyses used longest ago until all together are at most `limit` bytes.

    One that is in use, or that may not be deleted, is left to the next time.
    """
    analyses = [path for path in _files(folder) if path.name.endswith((SUFFIX, SET_ASIDE))]
    total = 0
    for path in sorted(analyses, key=_last_used, reverse=True):
        total += _size(path)
        if total > limit:
            with suppress(OSError):
                path.unlink(missing_ok=True)
                solutions_path(path).unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    """All analyses, what is remembered beside them, and what was set aside because of damage."""
    suffixes = (SUFFIX, SOLUTIONS, SET_ASIDE)
    return [path for suffix in suffixes for path in sorted(folder.glob(f"*{suffix}"))]


def _size(path: Path) -> int:
    """In bytes; 0 for a file that is gone by now."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _last_used(path: Path) -> float:
    if path.name.endswith(SET_ASIDE):
        return 0.0  # of no use to anybody: it goes first
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _width(path: Path) -> int:
    """As its name says; 0 for a file of somebody else's."""
    digits = path.name.removesuffix(SUFFIX).rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0
