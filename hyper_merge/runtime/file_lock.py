"""Locks between processes, as files that the operating system locks; nothing ever waits for long.

The system drops the locks of a process that ends, however it ends: a file that is left behind locks
nothing. Where there are no locks, as in some network folders, that is said, and the caller goes on
without.
"""

from __future__ import annotations

import errno
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from pathlib import Path
from typing import Final

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

PAUSE: Final = 0.05  # seconds between looks at a lock that another one holds

_TRIES: Final = 20  # to open a lock's file, which others remove and make again
_PATIENCE: Final = 30.0  # seconds; what is done alone takes a few milliseconds
_BUSY: Final = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK)
_MOMENT: Final = 5.0  # seconds for which a file may be open in another process
_REMOVED_WHILE_OPEN: Final = sys.platform != "win32"  # whether a file can be
_SHARES: Final = 2**30  # bytes of a Windows lock, beyond the file's end; whoever shares takes one


class State(Enum):
    """What came of asking for a lock."""

    HELD = auto()  # by us
    TAKEN = auto()  # by another one that is alive
    IMPOSSIBLE = auto()  # there are no locks here, or the folder cannot be written to


class FileLock:
    """A lock by the name of a file, which exists for nothing else; made with its folder if need be.

    It also works between threads of one process. An object holds it once at a time.
    """

    def __init__(self, path: Path) -> None:
        """Names the file; makes none."""
        self.path = path
        self._file: int | None = None
        self._folders: list[Path] = []  # made for it, the outermost first
        self._without = False  # there are no locks here

    def acquire(self, *, shared: bool = False) -> State:
        """Takes the lock if it is free; returns at once.

        Args:
            shared: with others that share it too.
        """
        state = self._acquired(shared=shared)
        self._without = state is State.IMPOSSIBLE
        return state

    def _acquired(self, *, shared: bool) -> State:
        for _ in range(_TRIES):
            try:
                file = self._open()
            except (FileNotFoundError, PermissionError):
                time.sleep(PAUSE / _TRIES)  # removed this moment; Windows refuses it meanwhile
                continue
            except OSError:
                return State.IMPOSSIBLE
            state = _lock(file, shared=shared)
            if state is State.HELD and self._is_named(file):
                self._file = file
                return state
            os.close(file)
            if state is not State.HELD:
                return state
        return State.IMPOSSIBLE

    def release(self, *, remove: bool = False) -> None:
        """Gives the lock back if it is held; never fails.

        Args:
            remove: the file too, with the folders that were made for it if nothing is in them. For
                whoever held the lock alone, or found that there are none.
        """
        file, self._file = self._file, None
        if file is not None and remove and _REMOVED_WHILE_OPEN:
            self._remove()  # while it is held: nobody may take what is about to go
        if file is not None:
            os.close(file)
        if remove and (self._without or (file is not None and not _REMOVED_WHILE_OPEN)):
            self._remove()  # refused where another one has opened it meanwhile
        if remove:
            self._remove_folders()

    def _open(self) -> int:
        missing = [folder for folder in self.path.parents if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._folders.append(folder)
        return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)

    def _is_named(self, file: int) -> bool:
        """Tells whether the file is still there by its name: a removed one locks out nobody."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(file), self.path.stat())
        return False

    def _remove(self) -> None:
        with suppress(OSError):
            self.path.unlink()

    def _remove_folders(self) -> None:
        with suppress(OSError):  # something is in it by now
            while self._folders:
                self._folders[-1].rmdir()
                self._folders.pop()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """For reading a small shared file, changing and writing it again without losing others' changes.

    Goes on without a lock where there are none, or where the holder does not move.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    end = time.monotonic() + _PATIENCE
    while lock.acquire() is State.TAKEN and time.monotonic() < end:
        time.sleep(PAUSE / 2)
    try:
        yield
    finally:
        lock.release(remove=True)


def patiently(action: Callable[[], None]) -> None:
    """Tries again, for some seconds, what Windows refuses while another process has the file open.

    Raises:
        OSError: that of the last try.
    """
    end = time.monotonic() + _MOMENT
    while True:
        try:
            return action()
        except OSError as error:
            cause = error.__cause__ or error
            if not isinstance(cause, PermissionError) or time.monotonic() >= end:
                raise
        time.sleep(PAUSE)


def _state_of(error: OSError) -> State:
    return State.TAKEN if error.errno in _BUSY else State.IMPOSSIBLE


if sys.platform == "win32":

    def _lock(file: int, *, shared: bool) -> State:
        """Windows locks ranges of bytes, for one holder each: who shares takes any one of many."""
        os.lseek(file, 1 + secrets.randbelow(_SHARES) if shared else 1, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1 if shared else _SHARES)
        except OSError as error:
            return _state_of(error)
        return State.HELD

else:

    def _lock(file: int, *, shared: bool) -> State:
        """Of the opened file, not of the process: threads are kept apart as well."""
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            return _state_of(error)
        return State.HELD
