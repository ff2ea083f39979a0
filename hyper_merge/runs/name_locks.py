"""Locks the names of runs, fits and hyper-models that a running job writes, or reads for long."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from hyper_merge.errors import NameTakenError
from hyper_merge.runtime.file_lock import PAUSE, FileLock, LockState, remove_unheld

_Kind = Literal["merge", "run", "model", "fit"]

_WORDS: Final[Mapping[_Kind, str]] = {
    "merge": "the name",
    "run": "the run",
    "model": "the hyper-model",
    "fit": "the name of a fit",
}
_OTHER: Final = ", or choose another name"
_ADVICE: Final[Mapping[_Kind, str]] = {"merge": _OTHER, "run": "", "model": "", "fit": _OTHER}
_PATIENCE: Final = (
    1.0  # seconds: a job that ends may hold the lock for a moment to see if it was the last
)


@dataclass(frozen=True)
class Hold:
    """A name of a kind; names of different kinds have nothing to do with each other.

    Attributes:
        kind: The kind of thing that has this name; `merge` for the name that the user gave, from
            which those of run and hyper-model follow.
        name: The name; letter case is ignored, as in the file systems of Windows and macOS.
        shared: Whether other jobs may share it: it is read, not written.
    """

    kind: _Kind
    name: str
    shared: bool = False


@contextmanager
def held(folder: Path, *holds: Hold) -> Iterator[None]:
    """Holds names within the block, where the file system has locks.

    Args:
        folder: of the runs.
        holds: the names.

    Raises:
        NameTakenError: another job holds one of them.
    """
    with ExitStack() as stack:
        for hold in holds:
            stack.enter_context(_held(folder, hold))
        yield


@contextmanager
def _held(folder: Path, hold: Hold) -> Iterator[None]:
    lock = FileLock(folder / f".{hold.name.lower()}.{hold.kind}.lock")
    end = time.monotonic() + _PATIENCE
    while lock.acquire(shared=hold.shared) is LockState.TAKEN:
        if time.monotonic() > end:
            raise NameTakenError(
                f"{_WORDS[hold.kind]} {hold.name} is in use by another Hyper-Merge that is running",
                hint=f"try again when that is done{_ADVICE[hold.kind]}",
            )
        time.sleep(PAUSE)
    try:
        yield
    finally:
        if hold.shared:
            lock.release()
        if not hold.shared or lock.acquire() is not LockState.TAKEN:  # the last one who shared it
            lock.release(remove=True)


def remove_unheld_names(folder: Path) -> None:
    """Removes the locks of names that killed processes have left; never fails.

    Args:
        folder: of the runs.
    """
    remove_unheld(path for kind in _WORDS for path in folder.glob(f".*.{kind}.lock"))
