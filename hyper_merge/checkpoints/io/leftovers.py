"""What transactions that did not come to their end have left: whose it is, and its removal.

A transaction locks a file of its own in every folder that it writes to. The operating system drops the
lock of a process that ends: files of a transaction without a locked one are leftovers, which the
next transaction in the folder removes. If there is a journal among them, it undoes that first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from hyper_merge.checkpoints.io.journal import JournalFile
from hyper_merge.checkpoints.io.temporary_names import (
    JOURNAL,
    LOCK,
    PREVIOUS,
    new_owner,
    own_files,
    owner_of,
    temporary_path,
)
from hyper_merge.runtime.disks import disk_time
from hyper_merge.runtime.file_lock import PAUSE, FileLock, LockState

_OLD_ENOUGH: Final = 24 * 60 * 60.0  # seconds since the last change of one that no lock belongs to
_OVER: Final = 10 * 60.0  # seconds since a journal was written where there are no locks
_PATIENCE: Final = 5.0  # seconds; another process undoes a transaction in milliseconds


class ClaimedFolders:
    """The folders in which a transaction has files that nobody else may remove."""

    def __init__(self) -> None:
        """Claims none."""
        self.owner = new_owner()
        self._locks: dict[Path, FileLock] = {}

    def claim(self, folder: Path) -> None:
        """Removes the leftovers in a folder and locks a file there; does nothing where it did so."""
        if folder in self._locks:
            return
        remove_leftovers(folder)
        lock = FileLock(temporary_path(folder / "_", LOCK, self.owner))
        self._locks[folder] = lock
        lock.acquire()  # where there are no locks, files without one count as in use for a day

    def release(self) -> None:
        """Gives all folders back; never fails. What is left in one goes with the next transaction."""
        for folder, lock in self._locks.items():
            left = [path for path in _files_of(self.owner, folder) if path != lock.path]
            lock.release(remove=not left)
        self._locks.clear()


@contextmanager
def claimed(folder: Path) -> Iterator[str]:
    """Claims one folder within the block; gives the digits with which temporary names there begin."""
    folders = ClaimedFolders()
    try:
        folders.claim(folder)
        yield folders.owner
    finally:
        folders.release()


def remove_leftovers(folder: Path) -> None:
    """Undoes what earlier transactions did not finish in a folder, and removes their files; never fails.

    Those are the transactions whose lock file is there and free. Where there are no locks, a journal
    counts as left over after ten minutes, and other files after a day: unfinished ones, and second names
    of files that have another one as well. A former file without another name stays, for it may
    be all that is left of it.
    """
    for owner in sorted({owner_of(path.name) or "" for path in own_files(folder)}):
        for place in _folders_of(owner, folder):
            _remove_of(owner, place)


def _folders_of(owner: str, folder: Path) -> list[Path]:
    """Returns all folders of a transaction as far as they are known, the one with the journal first."""
    for path in _files_of(owner, folder):
        if path.suffix == JOURNAL:
            with suppress(OSError, ValueError):
                return [*JournalFile.read(path).folders]
    return [folder]


def _remove_of(owner: str, folder: Path) -> None:
    """Removes the files of a transaction in a folder if it has ended."""
    locks = [path for path in _files_of(owner, folder) if path.suffix == LOCK]
    lock = FileLock(locks[0]) if locks else None
    state = _acquire(lock) if lock else LockState.IMPOSSIBLE
    files = [path for path in _files_of(owner, folder) if path not in locks]  # as they are by now
    if lock and state is LockState.HELD:
        lock.release(remove=_remove_ended(files))
    elif state is LockState.IMPOSSIBLE:
        journals = [path for path in files if path.suffix == JOURNAL]
        if journals and _is_over(journals[0]):
            _remove_ended(files)
        for path in filter(_is_forgotten, [*files, *locks]):
            _remove(path)


def _acquire(lock: FileLock) -> LockState:
    """Takes a lock, also one that another process needs for a moment to undo the same transaction."""
    end = time.monotonic() + _PATIENCE
    while (state := lock.acquire()) is LockState.TAKEN and time.monotonic() < end:
        if not _has_journal(lock.path):
            break
        time.sleep(PAUSE)
    return state


def _remove_ended(files: list[Path]) -> bool:
    """Removes a transaction's files in a folder; returns whether none is needed and all are gone."""
    settled = [_is_settled(path) for path in files if path.suffix == JOURNAL]
    if not all(settled):
        return False
    gone = [_remove(path) for path in files]
    return all(gone)


def _is_settled(path: Path) -> bool:
    """Undoes what a journal tells about; returns whether nothing of it is left to do."""
    try:
        file = JournalFile.read(path)
        return file.undo() if file.is_journal else file.is_over
    except FileNotFoundError:  # another process has undone it
        return True
    except (OSError, ValueError):
        return False


def _is_forgotten(path: Path) -> bool:
    if path.suffix == JOURNAL:
        return False
    with suppress(OSError):
        has_another_name = path.suffix != PREVIOUS or path.stat().st_nlink > 1
        return has_another_name and time.time() - _changed(path) > _OLD_ENOUGH
    return False


def _is_over(journal: Path) -> bool:
    """Tells, where there are no locks, whether the transaction of a journal must have ended."""
    return disk_time(journal.parent) - _changed(journal) > _OVER


def _changed(path: Path) -> float:
    """Returns the time of a file's last change in seconds; now if it is gone."""
    try:
        status = path.stat()
    except OSError:
        return time.time()
    return max(status.st_mtime, status.st_ctime)  # a new name changes the second alone


def _has_journal(lock: Path) -> bool:
    """Tells whether the transaction of a lock is changing files, or was."""
    owner = owner_of(lock.name) or ""
    return any(path.suffix == JOURNAL for path in _files_of(owner, lock.parent))


def _remove(path: Path) -> bool:
    """Removes a file; returns whether it is gone."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
        return True
    return False


def _files_of(owner: str, folder: Path) -> list[Path]:
    return [path for path in own_files(folder) if owner_of(path.name) == owner]
