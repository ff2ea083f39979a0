"""Reads the tensors of a .safetensors file through a read-only mapping.

The library maps every file privately, as if it were to be written to: Windows then sets memory aside
for the whole of it (error 1455 where there is none left), Linux refuses files larger than its memory.
"""

from __future__ import annotations

import mmap as mmap_module
import os
from mmap import ACCESS_READ, mmap
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import numpy as np
import torch
from torch import Tensor

from hyper_merge.checkpoints.io.safetensors_header import SafetensorsTable, read_table_from
from hyper_merge.runtime.aligned_bytes import read_at

_CLOSED: Final = SafetensorsTable({}, {}, {}, {}, 0)
_NOTHING: Final = np.empty(0, np.uint8)


class MappedTensors:
    """The tensors of a file that stays mapped, by their keys; use as a context manager.

    A tensor is a view of the file and keeps it mapped: it stays valid when the block is left. The
    mapping ends with the last of block and tensors, and until then Windows lets nobody replace or
    delete the file.
    """

    def __init__(self, path: Path, *, sparse: bool = False) -> None:
        """Names the file; nothing is read before the block is entered.

        Args:
            path: the file.
            sparse: whether to read nothing ahead, for small parts of tensors.
        """
        self.path = path
        self._sparse = sparse
        self._bytes: np.ndarray[Any, np.dtype[np.uint8]] = _NOTHING
        self._table = _CLOSED

    def __enter__(self) -> MappedTensors:
        """Maps the file.

        Raises:
            CheckpointError: the file is no .safetensors file, damaged or truncated.
            OSError: the file cannot be read or mapped.
        """
        with self.path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            self._table = read_table_from(stream, self.path.name, size)
            self._bytes = map_file(stream, size, sparse=self._sparse)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The mapping ends by itself: never below a tensor that is in use.
        self._table, self._bytes = _CLOSED, _NOTHING

    def get(self, key: str) -> Tensor:
        """Returns a tensor in its stored type; nothing may be written into it.

        Raises:
            KeyError: the file has no such tensor of a type that torch knows.
        """
        info, start = self._table.tensors[key], self._table.starts[key]
        stored = torch.from_numpy(self._bytes[start : start + info.nbytes])
        if start % info.dtype.itemsize:  # not every program pads its header
            stored = stored.clone()
        return stored.view(info.dtype).reshape(info.shape)


class ReadTensors:
    """The tensors of a file that is read piece by piece, in any thread; use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Names the file; nothing is read before the block is entered."""
        self.path = path
        self._table = _CLOSED

    def __enter__(self) -> ReadTensors:
        """Opens the file; raises what `MappedTensors` does."""
        self._stream = self.path.open("rb")
        try:
            size = os.fstat(self._stream.fileno()).st_size
            self._table = read_table_from(self._stream, self.path.name, size)
        except BaseException:
            self._stream.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._table = _CLOSED
        self._stream.close()

    def get(self, key: str) -> Tensor:
        """Returns a tensor in its stored type.

        Raises:
            KeyError: the file has no such tensor of a type that torch knows.
            OSError: the file cannot be read, or has become shorter.
        """
        info, start = self._table.tensors[key], self._table.starts[key]
        stored = read_at(self._stream, start, info.nbytes)
        if start % info.dtype.itemsize:  # as above
            stored = stored.clone()
        return stored.view(info.dtype).reshape(info.shape)


def map_file(
    stream: BinaryIO, size: int, *, sparse: bool = False
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Returns the bytes of an open file, mapped read-only for as long as something refers to them.

    Nothing may be written into them, which would end the process, though they look as if it might.

    Args:
        stream: the file.
        size: in bytes.
        sparse: whether to read nothing ahead of what is used, where the system can be told.

    Raises:
        OSError: the file cannot be mapped.
        ValueError: it is shorter than `size`, in bytes.
    """
    mapping = mmap(stream.fileno(), size, access=ACCESS_READ)
    if sparse and hasattr(mapping, "madvise") and hasattr(mmap_module, "MADV_RANDOM"):
        mapping.madvise(mmap_module.MADV_RANDOM)
    return np.asarray(_Bytes(mapping))


class _Bytes:
    """A mapping for numpy, as if it could be written to: torch has no other tensors, and would warn."""

    def __init__(self, mapping: mmap) -> None:
        self._read_only = np.frombuffer(mapping, np.uint8)
        interface = self._read_only.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
