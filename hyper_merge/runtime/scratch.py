"""Keeps tensors that are needed later: in memory up to a limit, and beyond it in a file without a name.

What lies in the file is mapped and read when it is used. Its pages belong to the system, which keeps
them as long as nobody needs the memory and writes them to the disk otherwise.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import weakref
from bisect import insort
from collections import deque
from collections.abc import Iterable, Sequence
from mmap import ALLOCATIONGRANULARITY, mmap
from pathlib import Path
from typing import BinaryIO, Final

import torch
from torch import Tensor

from hyper_merge.runtime.parallel import MEMORY

RESIDENT: Final = 2**30  # bytes that lie in memory before the file is used

_LEAST: Final = 2**15  # bytes of tensors that stay where they are: a mapping has whole pages
_ALIGNMENT: Final = 64  # bytes, as torch aligns its own memory


class Scratch:
    """Room for tensors that are needed later.

    A tensor that was kept gives its room back when nothing refers to it any more; it stays valid when
    the scratch is closed. Where the file cannot be made or its disk is full, memory takes everything.
    """

    def __init__(self, folder: Path | None = None, resident: int = RESIDENT) -> None:
        """Takes no room yet.

        Args:
            folder: of the file, which has no name there, or one until the process ends; None to leave
                all tensors where they are.
            resident: bytes that lie in memory before the file is used.
        """
        self._folder = folder
        self._limit = resident
        self._resident = 0  # bytes
        self._file: BinaryIO | None = None
        self._free = _FreeParts()
        self._lock = threading.Lock()
        # A tensor may end in any thread, also in one that holds the lock.
        self._ended: deque[tuple[int | None, int]] = deque()

    def keep(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns equal tensors that take none of the process's own memory beyond the limit.

        Nothing may be written into them. Those of a GPU, and small ones, are returned as they are.

        Args:
            tensors: which are needed for about the same time: they share their room.
        """
        kept = list(tensors)
        large = [place for place, tensor in enumerate(kept) if _is_movable(tensor)]
        if self._folder is None or sum(kept[place].nbytes for place in large) < _LEAST:
            return kept
        rows = [_row_by_row(kept[place]) for place in large]
        stored = self._store([row for row, _ in rows])
        if stored is not None:
            for place, row, (_, is_turned) in zip(large, stored, rows, strict=True):
                kept[place] = row.mT if is_turned else row
        return kept

    def close(self) -> None:
        """Ends the file with the last of the tensors in it; later ones lie in memory."""
        with self._lock:
            self._folder = None
            if self._file is not None:
                self._file.close()

    def _store(self, rows: Sequence[Tensor]) -> list[Tensor] | None:
        """Returns copies of contiguous tensors in one mapping; None where there is no room for it."""
        sizes = [-(-row.nbytes // _ALIGNMENT) * _ALIGNMENT for row in rows]
        size = -(-sum(sizes) // ALLOCATIONGRANULARITY) * ALLOCATIONGRANULARITY
        content = self._mapping(size, rows, sizes)
        if content is None:
            return None
        MEMORY.return_if_grown()
        copies = []
        for row, part in zip(rows, torch.split(content, sizes), strict=True):
            copies.append(part[: row.nbytes].view(row.dtype).view(row.shape))
        return copies

    def _mapping(self, size: int, rows: Sequence[Tensor], sizes: Sequence[int]) -> Tensor | None:
        """Returns the bytes of the rows (sum of the sizes,), padded, in memory or in the file."""
        with self._lock:
            while self._ended:
                self._release(*self._ended.popleft())
            start = None
            in_memory = self._resident + size <= self._limit
            try:
                if in_memory:
                    mapping = _own_memory(size)
                    self._resident += size
                else:
                    start = self._free.take(size)
                    mapping = self._written(start, size, rows, sizes)
            except (OSError, ValueError):  # no room, or no mappings left
                if start is not None:
                    self._free.give(start, size)
                self._folder = None
                return None
        weakref.finalize(mapping, self._ended.append, (start, size)).atexit = False
        content = torch.frombuffer(mapping, dtype=torch.uint8, count=sum(sizes))
        if in_memory:
            for row, part in zip(rows, torch.split(content, list(sizes)), strict=True):
                part[: row.nbytes].copy_(_bytes_of(row))
        return content

    def _written(self, start: int, size: int, rows: Sequence[Tensor], sizes: Sequence[int]) -> mmap:
        """Returns a mapping of a part of the file in which the rows have been written.

        Written, not copied into the mapping: a full disk is an error here, there it ends the process.
        """
        if self._file is None:
            # Without a buffer: what is written must be seen through the mapping.
            self._file = tempfile.TemporaryFile(  # noqa: SIM115 - it outlives this call
                dir=self._folder, prefix=".hyper-merge-", buffering=0
            )
        _write_at(
            self._file, start + size - 1, memoryview(b"\0")
        )  # all of it is there to be mapped
        end = start
        for row, length in zip(rows, sizes, strict=True):
            _write_at(self._file, end, _bytes_of(row).numpy().data)
            end += length
        return mmap(self._file.fileno(), size, offset=start)

    def _release(self, start: int | None, size: int) -> None:
        if start is None:
            self._resident -= size
        else:
            self._free.give(start, size)


class InMemory(Scratch):
    """Keeps tensors in memory, with strides and alignment as any other scratch would give them.

    For work in another process, whose results lie elsewhere afterwards.
    """

    def keep(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns equal tensors."""
        kept = list(tensors)
        large = [place for place, tensor in enumerate(kept) if _is_movable(tensor)]
        if sum(kept[place].nbytes for place in large) < _LEAST:
            return kept
        for place in large:
            row, is_turned = _row_by_row(kept[place])
            row = row.view(-1).view(row.shape)
            row = row.clone() if row.data_ptr() % _ALIGNMENT else row
            kept[place] = row.mT if is_turned else row
        return kept


class _FreeParts:
    """The free parts of a file that has no end."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, int]] = []  # start and end, in order, apart from each other
        self._end = 0  # of all that was ever taken

    def take(self, size: int) -> int:
        """Returns where the first free part of a size begins, and takes it."""
        for place, (start, end) in enumerate(self._parts):
            if end - start >= size:
                self._parts[place : place + 1] = [(start + size, end)] if end - start > size else []
                return start
        start = self._end
        if self._parts and self._parts[-1][1] == start:
            start = self._parts.pop()[0]
        self._end = start + size
        return start

    def give(self, start: int, size: int) -> None:
        """Takes a part back, and joins it with free ones beside it."""
        insort(self._parts, (start, start + size))
        place = self._parts.index((start, start + size))
        first, last = max(place - 1, 0), place + 2
        self._parts[first:last] = _joined(self._parts[first:last])


def _joined(parts: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in parts:
        touches = joined and joined[-1][1] == start
        joined.append((joined.pop()[0] if touches else start, end))
    return joined


def _is_movable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.numel() > 0


def _row_by_row(tensor: Tensor) -> tuple[Tensor, bool]:
    """Returns a tensor or its transpose, contiguous, and whether it is the transpose.

    Products of what lies in another order may differ in their last digits.
    """
    if tensor.dim() > 1 and not tensor.is_contiguous() and tensor.mT.is_contiguous():
        return tensor.mT, True
    return tensor.contiguous(), False


def _bytes_of(tensor: Tensor) -> Tensor:  # (bytes,), uint8
    return tensor.detach().reshape(-1).view(torch.uint8)


def _write_at(file: BinaryIO, start: int, content: memoryview) -> None:
    file.seek(start)
    while content:
        content = content[file.write(content) :]


def _own_memory(size: int) -> mmap:
    """Returns memory that goes back to the system when it ends, whatever lies around it."""
    if sys.platform == "win32":
        return mmap(-1, size)
    from mmap import MAP_ANONYMOUS, MAP_PRIVATE  # noqa: PLC0415 - Windows has neither

    return mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS)
