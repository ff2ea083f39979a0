"""Faults at the n-th use of the file system: an error of some kind, or the sudden end of the process."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from hyper_merge.checkpoints.io.mapped_tensors import MappedTensors
from hyper_merge.errors import HyperMergeError
from hyper_merge.runtime import file_lock

END: Final = "end of the process"
FULL: Final = "no space"  # also for all later writes
BROKEN: Final = "I/O error"
REFUSED: Final = "refused once"
IN_USE: Final = "in use"  # the same file also later
ERRORS: Final = {
    FULL: errno.ENOSPC,
    BROKEN: errno.EIO,
    REFUSED: errno.EACCES,
    IN_USE: errno.EACCES,
}

_EVENTS: Final = {
    "open": "open",
    "os.rename": "rename",
    "os.link": "link",
    "os.remove": "unlink",
    "os.mkdir": "mkdir",
    "os.rmdir": "rmdir",
    "os.utime": "utime",
    "mmap.__new__": "mmap",
}
_WRITES: Final = ("write", "pwrite", "fsync", "posix_fallocate")
_MAPPED: Final = "mmap read"
_READS: Final = ("open", "mmap", _MAPPED)


@dataclass(frozen=True)
class Fault:
    """A fault at the n-th use of the file system, of the kind `END` or one of `ERRORS`."""

    n: int
    kind: str


@dataclass(frozen=True)
class Outcome:
    """What came of work.

    Attributes:
        how: "done", "ended", "refused" in words of ours, or "failed" in others.
        words: Of the refusal or failure.
        uses: Number of uses of the file system, by name.
        use: The name of the use that the fault was injected in; empty where none was.
    """

    how: str
    words: str
    uses: dict[str, int]
    use: str


class Injector:
    """Counts the uses of the file system below a folder, and injects a fault into one of them.

    It stays until the process ends. Most uses are those that Python itself reports (audit events), so
    that there is no way around it.
    """

    def __init__(self, folder: Path, fault: Fault | None, end: Callable[[Injector], None]) -> None:
        """Watches a folder from now on.

        Args:
            folder: the folder.
            fault: the fault; None to count only.
            end: ends the process.
        """
        self.uses: Counter[str] = Counter()
        self.use = ""
        self._folder = os.path.realpath(folder) + os.sep
        self._fault = fault
        self._end = end
        self._refused: set[str] = set()
        sys.addaudithook(self._audit)
        for name in _WRITES:
            self._watch_writes(name)
        self._watch_mapped_reads()

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS:
            self._count(_EVENTS[event], [_path(a) for a in arguments[:2]])

    def _watch_writes(self, name: str) -> None:
        act = getattr(os, name)

        def watched(file: int, *arguments: Any) -> Any:
            def write_half() -> None:
                if name == "pwrite":
                    act(file, bytes(arguments[0])[: len(arguments[0]) // 2], arguments[1])

            self._count(name, [_path(file)], write_half)
            return act(file, *arguments)

        setattr(os, name, watched)

    def _watch_mapped_reads(self) -> None:
        act = MappedTensors.get

        def watched(file: MappedTensors, key: str) -> Tensor:
            self._count(_MAPPED, [_path(file.path)])
            return act(file, key)

        MappedTensors.get = watched  # type: ignore[method-assign]

    def _count(self, use: str, paths: list[str], half: Callable[[], None] = lambda: None) -> None:
        """Counts a use, and does what the fault does to it.

        Raises:
            OSError: the use fails.
        """
        if not any(path.startswith(self._folder) for path in paths):
            return
        self.uses[use] += 1
        if self._fault is None or not self._fails(self._fault, use, paths):
            return
        if self._fault.kind == END:
            half()
            self._end(self)
        number = errno.EIO if use in (_MAPPED, "mmap") else ERRORS[self._fault.kind]
        raise OSError(number, os.strerror(number), paths[0])

    def _fails(self, fault: Fault, use: str, paths: list[str]) -> bool:
        if self.uses.total() == fault.n:
            self.use = use
            self._refused.update(paths)
            return True
        if not self.use:
            return False
        if fault.kind == IN_USE:
            return use not in _READS and bool(self._refused.intersection(paths))
        return fault.kind == FULL and use in _WRITES


def _path(argument: object) -> str:
    """Returns the path that an argument is, or that its open file has; empty for none."""
    if isinstance(argument, int):
        argument = f"/proc/self/fd/{argument}" if argument >= 0 else ""
        return os.path.realpath(argument) if argument else ""
    if isinstance(argument, str | bytes | os.PathLike):
        return os.path.abspath(os.fsdecode(argument))  # noqa: PTH100 - links stay
    return ""


def attempt(work: Callable[[], object], folder: Path, fault: Fault | None = None) -> Outcome:
    """Does work in a forked process, with a fault below a folder; returns what came of it."""
    receive, send = os.pipe()
    if not (process := os.fork()):
        try:
            os.close(receive)
            _work(work, folder, fault, os.fdopen(send, "wb"))
        finally:
            os._exit(1)
    os.close(send)
    with os.fdopen(receive, "rb") as stream:
        data = stream.read()
    os.waitpid(process, 0)
    return Outcome(*json.loads(data))


def _work(work: Callable[[], object], folder: Path, fault: Fault | None, stream: Any) -> None:
    def end(injector: Injector, how: str = "ended", words: str = "") -> None:
        stream.write(json.dumps([how, words, injector.uses, injector.use]).encode())
        stream.flush()
        os._exit(0)  # as a kill does, without any cleaning up

    file_lock._MOMENT = 0.1  # type: ignore[misc]
    injector = Injector(folder, fault, end)
    try:
        work()
    except HyperMergeError as error:
        end(injector, "refused", str(error))
    except BaseException:
        end(injector, "failed", traceback.format_exc())
    end(injector, "done")
