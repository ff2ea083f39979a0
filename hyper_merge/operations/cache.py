"""Describes and clears the analysis cache; the results are plain text."""

from __future__ import annotations

from hyper_merge.analysis.cache import cache_bytes, clear_analyses
from hyper_merge.runs.folders import Folders
from hyper_merge.runtime.formatting import format_size


def format_cache(folders: Folders) -> str:
    """Returns a sentence about how much the cache holds, and what it is for."""
    held = format_size(cache_bytes(folders.cache))
    return (
        f"The cache holds {held} of at most {format_size(folders.cache_limit)}. With it another list of"
        " ranks takes a fraction of the time. It is safe to clear."
    )


def clear_cache(folders: Folders) -> str:
    """Deletes all analyses and returns a sentence about the bytes freed.

    To be called while nothing is merged.

    Raises:
        CacheError: a file cannot be deleted; the others are.
    """
    freed = clear_analyses(folders.cache)
    return f"The cache is empty; {format_size(freed)} are free again."
