"""The folder of analyses: finding one that serves, and keeping them within bounds.

One file per analysis, named after a hash of all that decides it, so that a changed checkpoint or
setting is never served an old one. Safe to delete at any time.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.analysis.store import SOLUTIONS, SUFFIX, analysis_identity, solutions_path
from hyper_merge.analysis.streaming_pass import PassOptions
from hyper_merge.analysis.use_markers import last_used, sweep, unused
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import CacheError, CheckpointError


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
    what = json.dumps(analysis_identity(inputs, options.seed), sort_keys=True).encode()
    return folder / f"{hashlib.sha256(what).hexdigest()[:20]}-{options.width}{SUFFIX}"


def find_analysis(
    folder: Path, inputs: MergeInputs, options: PassOptions, ranks: Sequence[int]
) -> Path | None:
    """The narrowest analysis of these files that serves the ranks; a damaged one is passed over."""
    stem = analysis_path(folder, inputs, options).name.partition("-")[0]
    files = {_width(path): path for path in folder.glob(f"{stem}-*{SUFFIX}")}
    for width in sorted(files):
        if (is_wide_enough(width, ranks) or width >= (options.width or 0)) and _is_whole(
            files[width]
        ):
            return files[width]
    return None


def cache_bytes(folder: Path) -> int:
    """Bytes of all analyses in a cache folder, 0 if there is none; hashes of files do not count."""
    return sum(_size(path) for path in _files(folder))


def clear_analyses(folder: Path) -> int:
    """Deletes all analyses but those in use; the remembered hashes stay: small, slow to make again.

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
            f"part of the cache cannot be deleted (first: {stuck[0]}); try again when no merge is"
            " running"
        )
    return freed


def prune_analyses(folder: Path, limit: int) -> None:
    """Deletes the analyses used longest ago until all together are at most `limit` bytes.

    One that is in use, or that may not be deleted, is left to the next time.
    """
    analyses = [path for path in _files(folder) if path.name.endswith(SUFFIX)]
    total = 0
    for path in sorted(analyses, key=last_used, reverse=True):
        total += _size(path)
        if total > limit:
            with suppress(OSError), unused(path) as free:
                if free:
                    path.unlink(missing_ok=True)
                    solutions_path(path).unlink(missing_ok=True)
    sweep(folder, SUFFIX)


def _files(folder: Path) -> list[Path]:
    """All analyses and what is remembered beside them."""
    return [path for suffix in (SUFFIX, SOLUTIONS) for path in sorted(folder.glob(f"*{suffix}"))]


def _size(path: Path) -> int:
    """In bytes; 0 for a file that is gone by now."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _width(path: Path) -> int:
    return int(path.name.removesuffix(SUFFIX).rpartition("-")[2])


def _is_whole(path: Path) -> bool:
    try:
        return "not_carried" in read_header(path).tensors
    except CheckpointError:
        return False
