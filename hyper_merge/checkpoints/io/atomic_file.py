"""One file written under a temporary name beside its place, then put there whole or not at all.

Windows refuses to replace a file while another program has it open, such as a virus scanner for a
moment after it was written: that is tried again for some seconds.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Final

from hyper_merge.checkpoints.io.output_errors import (
    as_output_error,
    require_unoccupied,
    sync_folder,
)
from hyper_merge.checkpoints.io.temporary_names import TEMPORARY, temporary_path
from hyper_merge.runtime.file_lock import patiently

# Errors by which a file system says that it cannot reserve space, though it may well have it.
_CANNOT_RESERVE: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV)


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
        self._lock = threading.Lock()

    def create(self) -> None:
        """Creates the temporary file and reserves its space; nothing is left of it on failure.

        Raises:
            OutputError: the place is taken, the folder is missing or read-only, the disk is full.
        """
        require_unoccupied(self.path, overwrite=self.overwrite)
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

    def commit(self) -> None:
        """Puts the sealed file in its place; every reader sees the old file or the new one, whole.

        Raises:
            OutputError: the place was taken meanwhile, or the operating system refuses.
        """
        require_unoccupied(self.path, overwrite=self.overwrite)
        with as_output_error(self.path, self.size):
            patiently(lambda: self.temporary.replace(self.path))
            sync_folder(self.path.parent)

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
