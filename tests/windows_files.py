"""Files as Windows has them: open and mapped ones stay where they are, and names have no case.

What is imitated, on Linux:
- a file that any process has open is neither renamed, replaced nor deleted, one that is mapped alone
  neither replaced nor deleted;
- a path leads to a file whose name differs by case alone.
"""

import builtins
import contextlib
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Patch = Callable[[Any, str, Any], None]
"""Replaces an attribute of a module, as `monkeypatch.setattr` does."""

# Functions and the numbers of those of their arguments that are paths.
_BY_PATH = {
    "stat": (0,),
    "lstat": (0,),
    "open": (0,),
    "scandir": (0,),
    "listdir": (0,),
    "mkdir": (0,),
    "rmdir": (0,),
    "utime": (0,),
    "unlink": (0,),
    "link": (0, 1),
    "rename": (0, 1),
    "replace": (0, 1),
}


def keep_open_files(
    patch: Patch,
    applies: Callable[[], bool] = lambda: True,
    processes: Callable[[], Iterable[int]] = lambda: [os.getpid()],
) -> None:
    """Lets `os` rename, replace and delete as Windows does, wherever that applies.

    Args:
        patch: replaces the functions.
        applies: says at each call whether it does.
        processes: their numbers, of all that may have a file open. To ask every process of the machine
            takes longer than the work itself.
    """

    def guard(name: str, *in_the_way: Callable[[Any], bool]) -> None:
        act = getattr(os, name)

        def guarded(*paths: Any, **options: Any) -> None:
            for path, is_in_use in zip(paths, in_the_way, strict=True):
                if applies() and is_in_use(path):
                    raise PermissionError(13, "in use", str(path))
            act(*paths, **options)

        patch(os, name, guarded)

    def is_open(path: Any) -> bool:
        return _is_open(path, processes())

    def is_open_or_mapped(path: Any) -> bool:
        return is_open(path) or _is_mapped(path, processes())

    guard("unlink", is_open_or_mapped)
    guard("replace", is_open, is_open_or_mapped)
    guard("rename", is_open, is_open_or_mapped)


def ignore_case(patch: Patch) -> None:
    """Lets all functions that take paths find names of any case."""
    find = _Finder()

    def wrap(module: Any, name: str, places: tuple[int, ...]) -> None:
        act = getattr(module, name)

        def wrapped(*values: Any, **options: Any) -> Any:
            paths = (
                find(value) if place in places else value for place, value in enumerate(values)
            )
            return act(*paths, **options)

        patch(module, name, wrapped)

    for name, places in _BY_PATH.items():
        wrap(os, name, places)
    for module in (io, builtins):
        wrap(module, "open", (0,))


class _Finder:
    """Returns the path that exists where a path differs from it by case alone."""

    def __init__(self) -> None:
        self._lstat, self._listdir = os.lstat, os.listdir  # as they were

    def __call__(self, path: Any) -> Any:
        if not isinstance(path, str | os.PathLike) or self._exists(path):
            return path
        folder, name = os.path.split(os.fspath(path))
        if not name:
            return path
        folder = self(folder) if folder else "."
        with contextlib.suppress(OSError):
            for other in self._listdir(folder):
                if other.casefold() == name.casefold():
                    return os.path.join(folder, other)  # noqa: PTH118 - Path would look it up
        return path

    def _exists(self, path: Any) -> bool:
        try:
            self._lstat(path)
        except (OSError, ValueError):
            return False
        return True


def _is_open(path: Any, processes: Iterable[int]) -> bool:
    status = _status(path)
    if status is None:
        return False
    for process in processes:
        with contextlib.suppress(OSError):
            for file in Path(f"/proc/{process}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.path.samestat(file.stat(), status):
                        return True
    return False


def _is_mapped(path: Any, processes: Iterable[int]) -> bool:
    status = _status(path)
    if status is None:
        return False
    for process in processes:
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{process}/maps").read_text().splitlines()
            if any(line.split()[4:5] == [str(status.st_ino)] for line in maps):
                return True
    return False


def _status(path: Any) -> os.stat_result | None:
    try:
        return os.stat(path)  # noqa: PTH116 - of any kind of path
    except OSError:
        return None
