"""One file written under a temporary name beside its place, then put there whole or not at all.

The temporary name is `.hyper-merge-<16 hex digits>.tmp`. A replaced file has a second name that ends
with `.old` for a moment, while several files are put in place together. Neither is ever read;
`leftovers` removes those that a killed process left behind.

Windows refuses to replace a file while another program has it open, such as a virus scanner for a
moment after it was written: that is tried again for some seconds.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Final

from hyper_merge.checkpoints.io.leftovers import PREVIOUS, TEMPORARY, temporary_path
from hyper_merge.errors import OutputError
from hyper_merge.runtime.file_lock import patiently

# Errors by which a file system says that it cannot reserve space, though it may well have it.
_CANNOT_RESERVE: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV)
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


class StagedFile:
    """A file being written beside its place; `commit` puts it there, `discard` removes it.

    Naming and creating it are two steps, so that an interrupt in between, or while it is created,
    finds somebody who knows what to discard.
    """

    _file: FileIO

    def __init__(
        self, path: Path, *, overwrite: bool, size: int = 0, owner: str | None = None
    ) -> None:
        """Names the temporary file; makes none.

        Args:
            path: where the file is to appear; its folder must exist.
            overwrite: whether a file there may be replaced.
            size: bytes that will be written, as far as known.
            owner: digits of the transaction that it belongs to, if any.
        """
        self.path = path
        self.overwrite = overwrite
        self.size = size
        self.temporary = temporary_path(path, TEMPORARY, owner)
        self._previous: Path | None = None
        self._was_free = False
        self._lock = threading.Lock()

    def create(self) -> None:
        """Creates the temporary file and reserves its space; nothing is left of it on failure.

        Raises:
            OutputError: the place is taken, the folder is missing or read-only, the disk is full.
        """
        require_free(self.path, overwrite=self.overwrite)
        try:
            with as_output_error(self.path, self.size):
                self._file = self.temporary.open("xb", buffering=0)
            self._reserve()
        except BaseException:
            self.discard()
            raise

    def write_at(self, data: memoryview, offset: int) -> None:
        """Writes bytes at an offset in bytes from the file's beginning; any order, any thread.

        Raises:
            OutputError: the disk is full or fails.
        """
        with as_output_error(self.path, self.size):
            while data:
                count = self._write_some(data, offset)
                data, offset = data[count:], offset + count

    def seal(self) -> None:
        """Flushes the bytes to the disk and closes the temporary file; it can be read then."""
        if self._file.closed:
            return
        with as_output_error(self.path, self.size):
            os.fsync(self._file.fileno())
            self._file.close()

    def commit(self, *, reversible: bool = False) -> None:
        """Puts the sealed file in its place; every reader sees the old file or the new one, whole.

        Args:
            reversible: keep a replaced file under a second name, so that `revert` can
                restore it; `forget_previous` must follow.

        Raises:
            OutputError: the place was taken meanwhile, or the operating system refuses.
        """
        require_free(self.path, overwrite=self.overwrite)
        with as_output_error(self.path, self.size):
            self._was_free = not os.path.lexists(self.path)
            if reversible and not self._was_free:
                self._keep_previous()
            patiently(lambda: _replace(self.temporary, self.path))
            sync_folder(self.path.parent)

    def revert(self) -> bool:
        """Undoes a reversible commit: restores the former file, or removes the new one.

        Returns:
            False where the former file has its second name alone, for the system refuses.
        """
        previous = self._previous
        if self.temporary.exists():  # it never came to the replacement
            self.forget_previous()
        elif previous is not None:
            with suppress(OSError):
                patiently(lambda: _replace(previous, self.path))
                previous.unlink(missing_ok=True)  # two names of one file survive a replacement
            return not previous.exists()
        elif self._was_free:
            with suppress(OSError):
                patiently(self.path.unlink)
        return True

    def forget_previous(self) -> None:
        """Removes the second name of the former file; never where it is the only one."""
        if self._previous is not None:
            with suppress(OSError):
                self._previous.unlink()

    def discard(self) -> None:
        """Removes the temporary file if it is still there; never fails."""
        with suppress(OSError, AttributeError):  # it may not have been created
            self._file.close()
        with suppress(OSError):
            self.temporary.unlink()

    def _write_some(self, data: memoryview, offset: int) -> int:
        """Writes as much as the operating system takes; returns the number of bytes."""
        if sys.platform != "win32":
            return os.pwrite(self._file.fileno(), data, offset)
        with self._lock:  # place and write are two steps there
            os.lseek(self._file.fileno(), offset, os.SEEK_SET)
            return os.write(self._file.fileno(), data[: 2**30])

    def _reserve(self) -> None:
        if not self.size:
            return
        with as_output_error(self.path, self.size):
            if sys.platform != "win32" and hasattr(os, "posix_fallocate"):
                try:
                    os.posix_fallocate(self._file.fileno(), 0, self.size)
                except OSError as error:
                    if error.errno not in _CANNOT_RESERVE:
                        raise
                else:
                    return
            if shutil.disk_usage(self.path.parent).free < self.size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _keep_previous(self) -> None:
        """Gives the former file a second name, and not another place: it never disappears from its own."""
        previous = self.temporary.with_suffix(PREVIOUS)
        with suppress(OSError):  # no hard links here (FAT, some network folders): not reversible
            previous.hardlink_to(self.path)
            self._previous = previous


class StagedRemoval:
    """An existing file about to disappear; `commit` removes it, `revert` restores it."""

    def __init__(self, path: Path, *, owner: str | None = None) -> None:
        """Names the file; nothing happens to it.

        Args:
            path: the file.
            owner: digits of the transaction that the removal belongs to, if any.
        """
        self.path = path
        self._kept = temporary_path(path, PREVIOUS, owner)

    def commit(self) -> None:
        """Removes the file; one that is gone already is no error.

        Raises:
            OutputError: the operating system refuses.
        """
        try:
            patiently(lambda: _rename(self.path, self._kept))
        except FileNotFoundError:
            return
        except OSError as error:
            raise OutputError(
                f"cannot remove {self.path}: {error.strerror or error}",
                hint="close the programs that use it, or see to the rights of its folder",
                file=self.path,
            ) from error
        sync_folder(self.path.parent)

    def revert(self) -> bool:
        """Restores the file; returns False where the system refuses, and its last name stays."""
        if self._kept.exists():
            with suppress(OSError):
                patiently(lambda: _rename(self._kept, self.path))
        return not self._kept.exists()

    def forget_previous(self) -> None:
        """Deletes the file for good."""
        with suppress(OSError):
            self._kept.unlink()


def _replace(source: Path, target: Path) -> None:
    source.replace(target)


def _rename(source: Path, target: Path) -> None:
    source.rename(target)


def require_free(path: Path, *, overwrite: bool) -> None:
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
