"""Finds analyses in the cache folder that can be used again, and limits the folder's size.

The name of each file is a hash of everything that decides the analysis, so that a changed checkpoint
or setting never gets an old one. The folder may be deleted at any time.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hyper_merge.analysis.checksums import stem_of
from hyper_merge.analysis.file_layout import analysis_identity
from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.analysis.sensitivities import SENSITIVITIES
from hyper_merge.analysis.store import SOLUTIONS, SUFFIX, fault_of, solutions_path
from hyper_merge.analysis.streaming_pass import PassOptions
from hyper_merge.analysis.use_markers import last_used, remove_stale_markers, unused
from hyper_merge.errors import CacheError
from hyper_merge.runtime.damaged_files import SET_ASIDE, DamagedFiles

_EXTENDED: Final = "extended"  # in the name of an analysis that extends an earlier one


@dataclass(frozen=True)
class AnalysisKind:
    """Which analyses of the same files and settings are looked for, and which is made.

    Attributes:
        exact: Whether only those from a pass over all files will do.
        extended: Whether a new one extends an earlier one (`analysis.extension`).
    """

    exact: bool = False
    extended: bool = False


ANY: Final = AnalysisKind()
"""Any analysis will do, and a new one comes from a pass over all files."""


def is_extended(path: Path) -> bool:
    """Returns whether an analysis extends an earlier one, by its name."""
    return f"-{_EXTENDED}-" in path.name


def required_width(ranks: Sequence[int]) -> int:
    """Returns the width of a new analysis's bases: twice the ranks, and enough for most later lists."""
    return max(512, -(-2 * sum(ranks) // 256) * 256)


def is_wide_enough(width: int, ranks: Sequence[int]) -> bool:
    """Returns whether bases of a width are wide enough for a list of ranks.

    At 1.5 times the sum of the ranks the loss is under 1 % above that at twice the sum.
    """
    return width >= 1.5 * sum(ranks)


def analysis_path(folder: Path, inputs: MergeInputs, options: PassOptions) -> Path:
    """Returns the path of the analysis of files, with the seed and width of the options."""
    return folder / f"{stem_of(analysis_identity(inputs, options.seed))}-{options.width}{SUFFIX}"


def new_analysis_path(
    folder: Path,
    inputs: MergeInputs,
    options: PassOptions,
    damaged: DamagedFiles,
    kind: AnalysisKind = ANY,
) -> Path:
    """Returns a path for a new analysis of a kind: another one if a damaged file holds the usual."""
    path = analysis_path(folder, inputs, options)
    stem, number = path.name.partition("-")[0], 1
    if kind.extended:
        stem = f"{stem}-{_EXTENDED}"
        path = folder / f"{stem}-{options.width}{SUFFIX}"
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
    kind: AnalysisKind = ANY,
) -> Path | None:
    """Returns the path of the narrowest analysis of files that suits a list of ranks, if any.

    Args:
        folder: the cache folder.
        inputs: the files.
        options: the settings; an analysis that is wider than these is suitable too.
        ranks: the ranks of the LoRAs.
        damaged: takes damaged analyses, and names those to skip; None to skip all damaged ones and
            leave them where they are.
        kind: which will do.
    """
    stem = analysis_path(folder, inputs, options).name.partition("-")[0]
    for path in sorted(folder.glob(f"{stem}-*{SUFFIX}"), key=lambda path: (_width(path), path)):
        width = _width(path)
        if not is_wide_enough(width, ranks) and width < (options.width or 1):
            continue
        if kind.exact and is_extended(path):
            continue
        if damaged is not None and path in damaged:
            continue
        fault = fault_of(path, inputs)
        if fault is None:
            return path
        if damaged is not None:
            damaged.take(path, fault)
    return None


def cache_bytes(folder: Path) -> int:
    """Returns the bytes of all analyses in a cache folder, without the hashes of checkpoints."""
    return sum(_size(path) for path in _files(folder))


def clear_analyses(folder: Path) -> int:
    """Deletes all analyses that are not in use; the cached hashes stay, since they are small.

    Returns:
        The bytes that were freed.

    Raises:
        CacheError: a file cannot be deleted; the others are.
    """
    stuck, freed = [], 0
    for path in _files(folder):
        size = _size(path)
        try:
            with unused(path) as free:
                if not free:
                    raise PermissionError(errno.EACCES, "in use")
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

    An analysis that is in use, or that may not be deleted, stays until the next time.
    """
    files = [
        path for path in _files(folder) if path.name.endswith((SUFFIX, SENSITIVITIES, SET_ASIDE))
    ]
    total = 0
    for path in sorted(files, key=_last_use, reverse=True):
        total += _size(path)
        if total > limit:
            with suppress(OSError):
                _delete(path)
    remove_stale_markers(folder, SUFFIX)


def _files(folder: Path) -> list[Path]:
    """Returns all analyses, what belongs to them, and files that were set aside as damaged."""
    suffixes = (SUFFIX, SOLUTIONS, SENSITIVITIES, SET_ASIDE)
    return [path for suffix in suffixes for path in sorted(folder.glob(f"*{suffix}"))]


def _size(path: Path) -> int:
    """Returns the bytes of a file; 0 if it is gone by now."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _last_use(path: Path) -> float:
    """Returns the time of last use in seconds; 0 for a damaged file, which is deleted first."""
    return 0.0 if path.name.endswith(SET_ASIDE) else last_used(path)


def _delete(path: Path) -> None:
    """Deletes an analysis that nobody uses, with its solutions, or a damaged one."""
    if path.name.endswith(SET_ASIDE):
        path.unlink(missing_ok=True)
        return
    with unused(path) as free:
        if free:
            path.unlink(missing_ok=True)
            solutions_path(path).unlink(missing_ok=True)


def _width(path: Path) -> int:
    """Returns the width in an analysis's name; 0 for a file of another program."""
    digits = path.name.removesuffix(SUFFIX).rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0
