"""Locks between processes, as files that the operating system locks; nothing ever waits for long.

The system drops the locks of a process that ends, however it ends: a file that is left behind locks
nothing. Where there are no locks, as in some network folders, the state says so, and the caller
continues without one.
"""

from __future__ import annotations

import errno
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from pathlib import Path
from typing import Final, TypeVar

from hyper_merge.errors import HyperMergeError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK_SUFFIX: Final = ".lock"
PAUSE: Final = 0.05  # seconds between attempts to take a lock that another process holds

_TRIES: Final = 20  # to open a lock's file, which others remove and create again
_PATIENCE: Final = 30.0  # seconds; work under an exclusive lock takes a few milliseconds
_BUSY: Final = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK)
_MOMENT: Final = 5.0  # seconds for which a file may be open in another process
_REMOVED_WHILE_OPEN: Final = sys.platform != "win32"  # whether an open file can be removed
_SHARES: Final = 2**30  # bytes of a Windows lock, beyond the file's end; each sharer takes one


_T = TypeVar("_T")


class LockState(Enum):
    """The outcome of a request for a lock."""

    HELD = auto()  # by us
    TAKEN = auto()  # by another holder that is alive
    IMPOSSIBLE = auto()  # there are no locks here, or the folder cannot be written to


class FileLock:
    """A lock by the name of a file, which serves no other purpose and is created with its folder.

    It also works between threads of one process. An object holds it at most once at a time.
    """

    def __init__(self, path: Path) -> None:
        """Names the file without creating it."""
        self.path = path
        self._file: int | None = None
        self._folders: list[Path] = []  # created for it, the outermost first
        self._without = False  # there are no locks here

    def acquire(self, *, shared: bool = False) -> LockState:
        """Takes the lock if it is free; returns at once.

        Args:
            shared: whether other holders may share it too.
        """
        state = self._try_to_acquire(shared=shared)
        self._without = state is LockState.IMPOSSIBLE
        return state

    def _try_to_acquire(self, *, shared: bool) -> LockState:
        for _ in range(_TRIES):
            try:
                file = self._open()
            except (FileNotFoundError, PermissionError):
                time.sleep(PAUSE / _TRIES)  # it is being removed; until then Windows refuses it
                continue
            except OSError:
                return LockState.IMPOSSIBLE
            state = _lock(file, shared=shared)
            if state is LockState.HELD and self._is_named(file):
                self._file = file
                return state
            os.close(file)
            if state is not LockState.HELD:
                return state
        return LockState.IMPOSSIBLE

    def release(self, *, remove: bool = False) -> None:
        """Gives the lock back if it is held; never fails.

        Args:
            remove: whether to remove the file too, with the folders that were created for it if
                they are empty. Only for a holder that shared the lock with nobody, or found that
                there are no locks.
        """
        file, self._file = self._file, None
        if file is not None and remove and _REMOVED_WHILE_OPEN:
            self._remove()  # while it is held: nobody may take what is about to go
        if file is not None:
            os.close(file)
        if remove and (self._without or (file is not None and not _REMOVED_WHILE_OPEN)):
            self._remove()  # refused where another process has opened it since
        if remove:
            self._remove_folders()

    def _open(self) -> int:
        missing = [folder for folder in self.path.parents if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._folders.append(folder)
        return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)

    def _is_named(self, file: int) -> bool:
        """Tells whether the file still exists by its name: a removed one excludes nobody."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(file), self.path.stat())
        return False

    def _remove(self) -> None:
        with suppress(OSError):
            self.path.unlink()

    def _remove_folders(self) -> None:
        with suppress(OSError):  # another process has put something into it
            while self._folders:
                self._folders[-1].rmdir()
                self._folders.pop()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keeps other processes from changing a small shared file while the block reads and rewrites it.

    Continues without a lock where there are none, or where the holder does not let go.
    """
    lock = FileLock(path.with_name(f".{path.name}{LOCK_SUFFIX}"))
    end = time.monotonic() + _PATIENCE
    while lock.acquire() is LockState.TAKEN and time.monotonic() < end:
        time.sleep(PAUSE / 2)
    try:
        yield
    finally:
        lock.release(remove=True)


def patiently(action: Callable[[], _T]) -> _T:
    """Repeats an action for some seconds if Windows refuses it while another process has the file open.

    Returns:
        What the action returns.

    Raises:
        OSError, HyperMergeError: that of the last try.
    """
    end = time.monotonic() + _MOMENT
    while True:
        try:
            return action()
        except (OSError, HyperMergeError) as error:
            cause = error.__cause__ or error
            if not isinstance(cause, PermissionError) or time.monotonic() >= end:
                raise
        time.sleep(PAUSE)


def remove_unheld(paths: Iterable[Path]) -> None:
    """Removes locks' files that nobody holds, as killed processes leave them; never fails."""
    for path in paths:
        lock = FileLock(path)
        if lock.acquire() is LockState.HELD:
            lock.release(remove=True)


def _state_of(error: OSError) -> LockState:
    return LockState.TAKEN if error.errno in _BUSY else LockState.IMPOSSIBLE


if sys.platform == "win32":

    def _lock(file: int, *, shared: bool) -> LockState:
        """Locks a range of bytes, which Windows gives to one holder: each sharer takes one of many."""
        os.lseek(file, 1 + secrets.randbelow(_SHARES) if shared else 1, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1 if shared else _SHARES)
        except OSError as error:
            return _state_of(error)
        return LockState.HELD

else:

    def _lock(file: int, *, shared: bool) -> LockState:
        """Locks the opened file, not the process, so that threads exclude each other as well."""
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            return _state_of(error)
        return LockState.HELD
