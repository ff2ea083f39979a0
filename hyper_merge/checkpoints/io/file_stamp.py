"""Stamps of files, by which what was read from one is known to be still what it holds."""

from __future__ import annotations

import os
import time
from typing import Final

_SETTLED: Final = 2 * 10**9  # nanoseconds: FAT counts two seconds as one moment

Stamp = tuple[int, int, int, int]
"""Number of the file, bytes, time of its content's change and of any change, in nanoseconds."""


def stamp_of(status: os.stat_result) -> Stamp:
    """Returns what is another after a file was changed or replaced."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def is_settled(stamp: Stamp) -> bool:
    """Tells whether a next change would show in the stamp: clocks of file systems tick slowly."""
    *_, modified, changed = stamp
    return time.time_ns() - max(modified, changed) > _SETTLED
