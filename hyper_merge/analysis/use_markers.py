"""Marks which analyses of the cache are in use, and when each was last used, without touching them.

Next to an analysis `x.analysis.safetensors` is an empty file `x.used`, whose modification time is
the last use. A process that uses the analysis shares a lock of that file; one that deletes it needs
the lock exclusively. Where there are no locks, the file is touched again and again while the analysis
is used, and a recent time means "in use". A process that makes the analysis holds a lock of `x.making`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from hyper_merge.runtime.disks import disk_time
from hyper_merge.runtime.file_lock import LOCK_SUFFIX, PAUSE, FileLock, LockState, remove_unheld
from hyper_merge.runtime.progress import Progress

USED: Final = ".used"

_MAKING: Final = ".making"
_WAITING: Final = "waiting for another merge of these files"
_BEAT: Final = 60.0  # seconds between touches where there are no locks
_PATIENCE: Final = 30.0
_YOUNG: Final = 10 * _BEAT


@contextmanager
def in_use(analysis: Path) -> Iterator[None]:
    """Keeps an analysis, existing or about to be made, from being deleted within the block."""
    lock = FileLock(_beside(analysis, USED))
    end = time.monotonic() + _PATIENCE
    while (state := lock.acquire(shared=True)) is LockState.TAKEN and time.monotonic() < end:
        time.sleep(PAUSE)  # another process is deleting it, which takes a moment
    mark_used(analysis)
    over = threading.Event()
    if state is not LockState.HELD:
        threading.Thread(target=_touch, args=(analysis, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        lock.release()
        _forget(lock, analysis)


@contextmanager
def making(analysis: Path, progress: Progress) -> Iterator[None]:
    """Keeps other processes from making this analysis within the block; waits while one does.

    Where there are no locks, no process waits, and the analysis may be made twice.

    Raises:
        InterruptedRun: the user ended the wait.
    """
    lock = FileLock(_beside(analysis, _MAKING))
    while lock.acquire() is LockState.TAKEN:
        progress.report(_WAITING, 0.0)
        time.sleep(PAUSE)
    try:
        yield
    finally:
        lock.release(remove=True)


@contextmanager
def unused(analysis: Path) -> Iterator[bool]:
    """Tells whether an analysis may be deleted: nobody uses it, or begins to within the block."""
    marker = _beside(analysis, USED)
    known, young = marker.exists(), _is_young(marker)  # before the lock makes it
    lock = FileLock(marker)
    state = lock.acquire()
    try:
        yield state is LockState.HELD or (state is LockState.IMPOSSIBLE and not young)
    finally:
        gone = state is LockState.HELD and not analysis.exists()
        lock.release(remove=state is not LockState.TAKEN and (gone or not known))


def mark_used(analysis: Path) -> None:
    """Makes an analysis the most recently used one, unless the folder cannot be written to."""
    with suppress(OSError):
        _beside(analysis, USED).touch()


def last_used(analysis: Path) -> float:
    """Returns when an analysis was last used or made, in seconds; 0 for one that is gone."""
    return max(_changed(_beside(analysis, USED)), _changed(analysis))


def remove_stale_markers(folder: Path, suffix: str) -> None:
    """Removes the markers and locks that killed processes left.

    Args:
        folder: of the cache.
        suffix: of an analysis' name.
    """
    for path in folder.glob(f"*{USED}"):
        _forget(FileLock(path), _beside(path, suffix))
    remove_unheld([*folder.glob(f"*{_MAKING}"), *folder.glob(f".*.json{LOCK_SUFFIX}")])


def _forget(lock: FileLock, analysis: Path) -> None:
    """Removes the lock's file where its analysis does not exist and is not about to be made."""
    if not analysis.exists() and lock.acquire() is not LockState.TAKEN:
        lock.release(remove=not analysis.exists())


def _touch(analysis: Path, over: threading.Event) -> None:
    while not over.wait(_BEAT):
        mark_used(analysis)


def _is_young(marker: Path) -> bool:
    """Tells whether a marker is recent, by the clock of the disk, which may be another machine's."""
    return disk_time(marker.parent) - _changed(marker) < _YOUNG


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _beside(analysis: Path, suffix: str) -> Path:
    return analysis.with_name(analysis.name.partition(".")[0] + suffix)
