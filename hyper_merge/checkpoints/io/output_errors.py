"""Refusals of places and disks, as errors that say what a user can do about them."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from hyper_merge.errors import OutputError

_ELSEWHERE: Final = "choose another folder"
_REASONS: Final = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file system cannot hold so large a file",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied, or another program uses the file",
    errno.EPERM: "permission denied",
    errno.ENAMETOOLONG: "the name is too long",
}
_HINTS: Final = {
    **dict.fromkeys(_REASONS, _ELSEWHERE),
    errno.ENOSPC: f"free some space or {_ELSEWHERE}",
    errno.EDQUOT: f"free some space or {_ELSEWHERE}",
    errno.ENAMETOOLONG: "choose a shorter one",
}


def require_unoccupied(path: Path, *, overwrite: bool) -> None:
    """Returns if a file may be written there.

    Raises:
        OutputError: a folder is there, a file that may not be replaced, or a file in place of its
            folder.
    """
    with as_output_error(path):
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir():
            raise OutputError(
                f"cannot write {path}: {above} is a file", hint="choose another place", file=path
            )
        if path.is_dir():
            raise OutputError(f"{path} is a folder", hint="choose another name", file=path)
        # lexists: a dangling link is somebody's file too.
        if not overwrite and os.path.lexists(path):
            raise OutputError(
                f"{path} exists",
                hint="choose another name, or --overwrite on the command line",
                file=path,
            )


@contextmanager
def as_output_error(path: Path, needed: int = 0) -> Iterator[None]:
    """Turns refusals of the operating system within the block into an `OutputError` about `path`.

    Args:
        path: the file that was to be written.
        needed: its size in bytes, for the message; 0 if unknown.
    """
    try:
        yield
    except OutputError:
        raise
    except FileNotFoundError as error:
        raise OutputError(
            f"cannot write {path}: its folder does not exist, or the temporary file was removed",
            file=path,
        ) from error
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "")
        raise OutputError(_message(path, needed, error), hint=hint, file=path) from error
    except ValueError as error:  # a NUL character
        raise OutputError(f"cannot write {str(path)!r}: {error}", file=path) from error


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to the disk, where the operating system can do so."""
    if sys.platform == "win32":
        return
    with suppress(OSError):  # some network file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _message(path: Path, needed: int, error: OSError) -> str:
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    size = f" ({needed:,} bytes needed{_free(path.parent)})" if needed else ""
    return f"cannot write {path}{size}: {reason}"


def _free(folder: Path) -> str:
    with suppress(OSError):
        return f", {shutil.disk_usage(folder).free:,} free"
    return ""
