"""What the file system says of a checkpoint's file, and the refusals that follow from it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from hyper_merge.checkpoints.io.header import Header
from hyper_merge.checkpoints.io.safetensors_header import COPY_AGAIN
from hyper_merge.errors import CheckpointError

ACCEPTED: Final = "choose a .safetensors, .ckpt or .gguf file"


def require_unchanged(header: Header) -> None:
    """Returns if the file still has the size and time of change that its header was read with.

    Raises:
        CheckpointError: it was changed, replaced or removed since then.
    """
    try:
        status = header.path.stat()
    except OSError as error:
        raise unreadable(header.path, error) from error
    if (status.st_size, status.st_mtime_ns) != (header.size, header.mtime_ns):
        raise CheckpointError(
            f"{header.name} was changed while being read",
            hint="run again when nothing writes to it",
            file=header.path,
        )


def status_of(path: Path) -> os.stat_result:
    """Returns size and times of an existing, regular, non-empty file.

    Raises:
        CheckpointError: it is none.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # bytes that Python keeps as halves of surrogate pairs
        raise CheckpointError(
            f"{path} has a name that is not valid UTF-8, which no metadata can hold",
            hint="rename the file or the folder",
            file=path,
        ) from error
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:  # a NUL character
        raise CheckpointError(f"{str(path)!r} is not a path: {error}", file=path) from error
    if stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"{path} is a folder, not a checkpoint", hint=ACCEPTED, file=path)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(
            f"{path} is a device or pipe, not a checkpoint", hint=ACCEPTED, file=path
        )
    if status.st_size == 0:
        raise CheckpointError(f"{path} is empty", hint=COPY_AGAIN, file=path)
    return status


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Returns the refusal of a file for what the operating system says of it."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return CheckpointError(f"{path} does not exist", hint="check the path", file=path)
    if isinstance(error, PermissionError):
        return CheckpointError(
            f"{path} may not be read: permission denied", hint="check its rights", file=path
        )
    return CheckpointError(f"{path} cannot be read: {error.strerror or error}", file=path)
