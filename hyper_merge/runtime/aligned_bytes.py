"""Reads bytes of files into memory that is aligned as a mapping of the file would be.

Libraries take other paths for other alignments, which round in another order.
"""

from __future__ import annotations

import os
import threading
from typing import BinaryIO, Final

import torch
from torch import Tensor

ALIGNMENT: Final = 64  # bytes: what torch gives its own memory
_LOCK: Final = threading.Lock()


def aligned_bytes(nbytes: int, lead: int) -> Tensor:  # (nbytes,), uint8
    """Returns memory that begins so many bytes behind a multiple of the alignment."""
    return torch.empty(lead + nbytes, dtype=torch.uint8)[lead:]


def read_at(stream: BinaryIO, start: int, nbytes: int) -> Tensor:  # (nbytes,), uint8
    """Returns bytes of a file; in any thread.

    Raises:
        OSError: it cannot be read, or ends before them.
    """
    content = aligned_bytes(nbytes, start % ALIGNMENT)
    rest = content.numpy().data
    while rest:
        count = _read_into(stream, start, rest)
        if not count:
            raise OSError("the file is cut off")
        start, rest = start + count, rest[count:]
    return content


def _read_into(stream: BinaryIO, start: int, memory: memoryview) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(stream.fileno(), [memory], start)
    with _LOCK:  # of the place from which a stream reads
        stream.seek(start)
        count: int = stream.readinto(memory)  # type: ignore[attr-defined]
        return count
