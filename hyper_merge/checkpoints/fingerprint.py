"""Fingerprints by which files of equal content are known without reading them whole."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Final

from hyper_merge.checkpoints.io.file_stamp import Stamp, is_settled, stamp_of
from hyper_merge.checkpoints.io.file_status import require_unchanged, status_of, unreadable
from hyper_merge.checkpoints.io.header import Header

_HEAD: Final = 4 * 2**20  # bytes
_PLACES: Final = 16
_SAMPLE: Final = 64 * 2**10  # bytes at each place


def fingerprint(header: Header) -> str:
    """Returns the SHA-256 (hex) of the file's size, its beginning and samples.

    Equal files have equal fingerprints. Reads at most 5 MiB. Files that differ only between the sampled places look alike: where that
    matters, compare `mtime_ns` too.

    Raises:
        CheckpointError: the file is unreadable or no longer the one of `header`.
    """
    require_unchanged(header)
    stamp = stamp_of(status_of(header.path))
    if is_settled(stamp):
        return _fingerprint_as_of(header.path, header.size, stamp)
    return _fingerprint_now(header.path, header.size)


@functools.lru_cache(maxsize=4096)
def _fingerprint_as_of(path: Path, size: int, _stamp: Stamp) -> str:
    """Returns the fingerprint that a file has as long as its stamp stays the same."""
    return _fingerprint_now(path, size)


def _fingerprint_now(path: Path, size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    try:
        with path.open("rb") as stream:
            digest.update(stream.read(_HEAD))
            for place in range(_PLACES):
                stream.seek(size * place // _PLACES)
                digest.update(stream.read(_SAMPLE))
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()
