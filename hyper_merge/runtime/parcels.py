"""Packs values for other processes: large tensors lie in files that all of them see, and travel as places there.

A tensor arrives with the strides and the alignment that it had: both decide how products of it are rounded.
"""

from __future__ import annotations

import io
import os
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple

import torch
from torch import Tensor

from hyper_merge.runtime.aligned_bytes import ALIGNMENT, aligned_bytes, read_at
from hyper_merge.runtime.progress import Progress
from hyper_merge.runtime.remote import Check
from hyper_merge.runtime.scratch import InMemory, Scratch

if TYPE_CHECKING:
    from typing_extensions import Self

_MOST_MAPPED: Final = 512  # files: each takes a descriptor, of which a process has about a thousand

_TASK: Final = threading.local()


class SentOnce:
    """Values that each process receives once, however many parcels refer to them."""

    def sent(self) -> dict[str, Any]:
        """Returns the attributes that another process needs."""
        return dict(self.__dict__)

    @classmethod
    def received(cls, attributes: dict[str, Any]) -> Self:
        """Returns an equal value, from what `sent` has returned in another process."""
        value = cls.__new__(cls)
        value.__dict__.update(attributes)
        return value


class OnDemand(Sequence[Any]):
    """Items of a value, each of which a process unpacks whenever it uses it."""

    def __init__(self, items: Sequence[Any]) -> None:
        """Takes the items."""
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: Any) -> Any:
        return self.items[place]


class _Form(NamedTuple):
    """How a tensor lies in its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _Form:
        return cls(tensor.dtype, tuple(tensor.shape), tensor.stride())

    @property
    def nbytes(self) -> int:
        """Bytes from the first entry to the last."""
        if 0 in self.shape:
            return 0
        last = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize

    def bytes_of(self, tensor: Tensor) -> Tensor:  # (nbytes,), uint8
        flat = tensor.as_strided((self.nbytes // self.dtype.itemsize,), (1,))
        return flat.view(torch.uint8)

    def made_of(self, content: Tensor) -> Tensor:
        """Returns the tensor from its bytes."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = content.view(self.dtype)
        return flat.as_strided(self.shape, self.strides, flat.storage_offset())


class Place(NamedTuple):
    """Where a tensor's bytes begin in a file."""

    path: str
    start: int


class TensorFile:
    """A file that takes the large tensors of parcels; it is there once it has any."""

    def __init__(self, path: Path) -> None:
        """Names the file."""
        self.path = path
        self.size = 0
        self._stream: BinaryIO | None = None

    def close(self) -> None:
        """Closes the file, all of which is written then."""
        if self._stream is not None:
            self._stream.close()

    def discard(self) -> None:
        """Removes the file."""
        if self._stream is not None:
            with suppress(OSError):
                self._stream.close()
            with suppress(OSError):
                self.path.unlink()

    def add(self, content: Tensor, lead: int) -> Place:
        """Writes bytes that begin so far behind a multiple of the alignment."""
        if self._stream is None:
            self._stream = self.path.open("xb")
        start = -(-self.size // ALIGNMENT) * ALIGNMENT + lead
        self._stream.write(bytes(start - self.size))
        self._stream.write(content.numpy().data)
        self.size = start + len(content)
        return Place(str(self.path), start)


class MappedFiles:
    """Files of tensors, each of which is mapped until its last tensor ends, and then removed."""

    def __init__(self, remove: Callable[[Path], None]) -> None:
        """Maps none yet; takes what removes a file."""
        self._remove = remove
        self._paths: dict[int, Path] = {}  # by the address

    def open(self, path: Path, size: int) -> Tensor:  # (size,), uint8
        """Returns the bytes of a file, into which nothing may be written.

        Raises:
            OSError: it cannot be read, or is shorter.
        """
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size < size:
                raise OSError("it is cut off")
            if len(self._paths) < _MOST_MAPPED:
                mapping = mmap(stream.fileno(), size, access=ACCESS_COPY)
            else:
                mapping = mmap(-1, size)
                mapping[:] = stream.read(size)
        content = torch.frombuffer(mapping, dtype=torch.uint8)
        address = content.data_ptr()
        self._paths[address] = path
        weakref.finalize(mapping, self._end, address).atexit = False
        return content

    def place_of(self, tensor: Tensor) -> Place | None:
        """Returns where a tensor begins in its file; None if it lies in none of them."""
        address = tensor.untyped_storage().data_ptr()
        path = self._paths.get(address)
        return Place(str(path), tensor.data_ptr() - address) if path else None

    def _end(self, address: int) -> None:
        self._remove(self._paths.pop(address))


class Packer:
    """Packs values, each into bytes of its own."""

    def __init__(
        self,
        file: TensorFile,
        least: int,
        place_of: Callable[[Tensor], Place | None],
        name_of: Callable[[SentOnce], str],
    ) -> None:
        """Takes where things go.

        Args:
            file: takes large tensors that lie in no file.
            least: bytes from which a tensor is large.
            place_of: returns where a tensor lies in a file, if it lies in one.
            name_of: returns the name of a value that is sent once.
        """
        self._file = file
        self._least = least
        self._place_of = place_of
        self.name_of = name_of

    def pack(self, value: Any) -> bytes:
        """Returns a value as bytes; functions in it are those of modules."""
        stream = io.BytesIO()
        _Pickler(stream, self).dump(value)
        return stream.getvalue()

    def placed(self, tensor: Tensor) -> tuple[Place, _Form] | None:
        """Returns where a tensor lies in a file; a large one does from now on."""
        form = _Form.of(tensor)
        place = self._place_of(tensor) if form.nbytes else None
        if place is None and form.nbytes >= self._least:
            place = self._file.add(form.bytes_of(tensor), tensor.data_ptr() % ALIGNMENT)
        return place and (place, form)


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, packer: Packer) -> None:
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self._packer = packer

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return self._packer.placed(obj)
        if isinstance(obj, SentOnce):
            return self._packer.name_of(obj)
        if isinstance(obj, OnDemand):
            return [self._packer.pack(item) for item in obj.items]
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            form = _Form.of(obj)
            content = form.bytes_of(obj).numpy().tobytes() if form.nbytes else b""
            return _tensor_of, (content, obj.data_ptr() % ALIGNMENT, *form)
        if isinstance(obj, Progress):
            return progress_of_task, ()
        if isinstance(obj, Scratch):
            return InMemory, ()
        return NotImplemented


@dataclass(frozen=True)
class Unpacker:
    """Unpacks parcels.

    Attributes:
        read: Returns bytes of a file, uint8.
        sent_once: Returns a value that is sent once, from its name.
    """

    read: Callable[[Place, int], Tensor]
    sent_once: Callable[[str], Any]

    def unpack(self, content: bytes) -> Any:
        """Returns the value."""
        return _Unpickler(io.BytesIO(content), self).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, unpacker: Unpacker) -> None:
        super().__init__(stream)
        self._unpacker = unpacker

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, str):
            return self._unpacker.sent_once(pid)
        if isinstance(pid, list):
            return _PackedItems(pid, self._unpacker)
        place, form = pid
        return form.made_of(self._unpacker.read(place, form.nbytes))


class _PackedItems(Sequence[Any]):
    def __init__(self, items: Sequence[bytes], unpacker: Unpacker) -> None:
        self._items, self._unpacker = items, unpacker

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, place: Any) -> Any:
        return self._unpacker.unpack(self._items[place])


def read_place(place: Place, nbytes: int) -> Tensor:  # (nbytes,), uint8
    """Returns bytes of a file, read into memory."""
    with Path(place.path).open("rb", buffering=0) as stream:
        return read_at(stream, place.start, nbytes)


@contextmanager
def checked_by(check: Check) -> Iterator[None]:
    """Has all progress that arrives in this thread's parcels stop when a check does, within the block."""
    _TASK.check = check
    try:
        yield
    finally:
        del _TASK.check


def progress_of_task() -> Progress:
    """Returns a progress that reports nothing, and stops when the thread's check does."""
    return Progress(should_stop=_check_task)


def _check_task() -> bool:
    check: Check | None = getattr(_TASK, "check", None)
    if check:
        check()
    return False


def _tensor_of(
    content: bytes,
    lead: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> Tensor:
    memory = aligned_bytes(len(content), lead)
    if content:
        memory.numpy()[:] = memoryview(content)
    return _Form(dtype, shape, strides).made_of(memory)
