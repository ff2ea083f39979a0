"""Temporary files beside a transaction's places: how they are called, whose they are, their removal.

A transaction locks a file `.hyper-merge-<16 hex digits>.lock` in every folder that it writes to; its
temporary files there begin with the same digits. The operating system drops the lock of a process that
ends: such files without a locked file are leftovers, which the next transaction in the folder removes.
"""

from __future__ import annotations

import re
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from hyper_merge.runtime.file_lock import FileLock, LockState

TEMPORARY: Final = ".tmp"
"""Suffix of a file that is being written."""

PREVIOUS: Final = ".old"
"""Suffix of the second name of a file that is being replaced, or the last one of a removed file."""

_LOCK: Final = ".lock"
_PREFIX: Final = ".hyper-merge-"
_NAME: Final = re.compile(
    rf"{re.escape(_PREFIX)}(?P<owner>[0-9a-f]{{8}})[0-9a-f]{{8}}\.(tmp|old|lock)"
)
_OLD_ENOUGH: Final = 24 * 60 * 60.0  # seconds since the last change of one that no lock belongs to


def new_owner() -> str:
    """Returns the eight digits with which all temporary names of a new transaction begin."""
    return secrets.token_hex(4)


def temporary_path(path: Path, suffix: str, owner: str | None = None) -> Path:
    """Returns a name beside a file that nothing else has.

    Args:
        path: the file that will be written, replaced or removed.
        suffix: `TEMPORARY` or `PREVIOUS`.
        owner: the transaction's digits; None outside of one.
    """
    return path.with_name(f"{_PREFIX}{owner or new_owner()}{secrets.token_hex(4)}{suffix}")


class ClaimedFolders:
    """The folders in which a transaction has temporary files that nobody else may remove."""

    def __init__(self) -> None:
        """Claims none."""
        self.owner = new_owner()
        self._locks: dict[Path, FileLock] = {}

    def claim(self, folder: Path) -> None:
        """Removes the leftovers in a folder and locks a file there; does nothing where it did so."""
        if folder in self._locks:
            return
        remove_leftovers(folder)
        lock = FileLock(temporary_path(folder / _PREFIX, _LOCK, self.owner))
        self._locks[folder] = lock
        lock.acquire()  # where there are no locks, files without one count as in use for a day

    def release(self, *, removable: bool = True) -> None:
        """Gives all folders back; never fails.

        Args:
            removable: whether the next transaction may remove what is left of this one, such as
                files that another program uses. False where something of the user's is in it.
        """
        for folder, lock in self._locks.items():
            names = (_owner_and_path(path) for path in _ours(folder) if path != lock.path)
            left = any(owner == self.owner for owner, _ in names)
            lock.release(remove=not (left and removable))
        self._locks.clear()


def remove_leftovers(folder: Path) -> None:
    """Removes what earlier transactions left in a folder; never fails.

    That is every file of a transaction whose lock file is there and free. Files of which no lock
    tells go after a day: unfinished ones, and second names of files that have another one as well. A
    former file without another name stays, for it may be all that is left of it.
    """
    files = _ours(folder)
    by_owner: dict[str, list[Path]] = {}
    for owner, path in map(_owner_and_path, files):
        by_owner.setdefault(owner, []).append(path)
    for paths in by_owner.values():
        locks = [path for path in paths if path.suffix == _LOCK]
        others = [path for path in paths if path.suffix != _LOCK]
        if not locks or not _remove_ended(locks[0], others):
            for path in filter(_is_forgotten, paths):
                _remove(path)


def _remove_ended(lock_path: Path, files: list[Path]) -> bool:
    """Removes the files of a transaction that has ended; returns whether its lock tells about that."""
    lock = FileLock(lock_path)
    state = lock.acquire()
    if state is LockState.HELD:
        gone = [_remove(path) for path in files]
        lock.release(remove=all(gone))
    return state is not LockState.IMPOSSIBLE


def _is_forgotten(path: Path) -> bool:
    with suppress(OSError):
        status = path.stat()
        changed = max(status.st_mtime, status.st_ctime)  # a new name changes the second alone
        has_another_name = path.suffix != PREVIOUS or status.st_nlink > 1
        return has_another_name and time.time() - changed > _OLD_ENOUGH
    return False


def _remove(path: Path) -> bool:
    """Removes a file; returns whether it is gone."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
        return True
    return False


def _ours(folder: Path) -> list[Path]:
    with suppress(OSError):
        return [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return []


def _owner_and_path(path: Path) -> tuple[str, Path]:
    return path.name.removeprefix(_PREFIX)[:8], path
