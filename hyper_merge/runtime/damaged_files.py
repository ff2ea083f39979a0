"""Sets damaged files of the cache aside, with a warning, so that they are not used."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

from hyper_merge.errors import DamagedCacheError

SET_ASIDE: Final = ".damaged"  # added to the name of a damaged file

_T = TypeVar("_T")


class DamagedFiles:
    """The damaged files that one run has met and does not use again."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        """Starts with none.

        Args:
            warn: called with a message for every damaged file.
        """
        self._warn = warn
        self._met: set[Path] = set()

    def __contains__(self, path: object) -> bool:
        return path in self._met

    def take(self, path: Path, reason: str) -> None:
        """Renames a damaged file and warns; deletes the one of its kind that was set aside before.

        A file that is gone, or that another program holds open (Windows does not rename it then),
        does not end the run.

        Args:
            path: the damaged file.
            reason: what is wrong with it, for the warning.
        """
        self._met.add(path)
        if not os.path.lexists(path):
            return
        moved = path.with_name(path.name + SET_ASIDE)
        try:
            if not path.is_file():
                raise IsADirectoryError(None, "it is not a file")
            for earlier in path.parent.glob(f"*.{path.name.partition('.')[2]}{SET_ASIDE}"):
                with suppress(OSError):
                    earlier.unlink()
            path.replace(moved)
        except OSError as error:
            self._warn(
                f"{path} is damaged ({reason}) and cannot be set aside ({error.strerror or error});"
                " this run does without it; delete it when no merge is running"
            )
        else:
            self._warn(
                f"{path} is damaged ({reason}); it is set aside as {moved.name}, and its content is"
                " computed again"
            )


def with_sound_cache(attempt: Callable[[DamagedFiles], _T], warn: Callable[[str], None]) -> _T:
    """Returns the result of an attempt, which is repeated without each cache file that proves damaged.

    Args:
        attempt: takes the damaged files, which it must not use.
        warn: called with a message for every damaged file.

    Raises:
        DamagedCacheError: a file that was written only just now is damaged.
    """
    damaged = DamagedFiles(warn)
    while True:
        try:
            return attempt(damaged)
        except DamagedCacheError as error:
            if error.path in damaged:
                raise
            path, reason = error.path, error.reason
        # Not before the error and its frames are gone, whose tensors keep the file mapped: a mapped
        # file cannot be renamed on Windows.
        damaged.take(path, reason)
