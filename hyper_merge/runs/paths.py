"""Tells whether paths from records exist, and whether two of them are the same place."""

from __future__ import annotations

import os
from pathlib import Path


def path_exists(path: Path) -> bool:
    """Tells whether a path that a manifest names leads to something."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a NUL character
        return False


def find_moved(path: Path, before: Path, now: Path) -> Path:
    """Returns where a file is now whose folder may have been moved; where it was if it is not there.

    Args:
        path: where the file was.
        before: where a folder was; only files in it or below it are looked for.
        now: where the folder is.
    """
    if path_exists(path) or not path.is_relative_to(before):
        return path
    moved = now / path.relative_to(before)
    return moved if path_exists(moved) else path


def same_place(one: Path, other: Path) -> bool:
    """Tells whether two paths lead to one place, whether a file exists there or not."""
    try:
        return os.path.realpath(one) == os.path.realpath(other)
    except ValueError:  # a NUL character: no path at all
        return False
