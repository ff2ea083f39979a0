"""Reads checkpoints: the table of contents alone, or tensor by tensor through a memory mapping."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Final

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.key_conversion import with_standard_keys
from hyper_merge.checkpoints.io.dtypes import EIGHT_BIT_FLOATS
from hyper_merge.checkpoints.io.file_stamp import Stamp, is_settled, stamp_of
from hyper_merge.checkpoints.io.header import Header, TensorInfo, TensorsAsKey
from hyper_merge.checkpoints.io.mapped_tensors import MappedTensors, ReadTensors
from hyper_merge.checkpoints.io.pickle_reader import load_pickled
from hyper_merge.checkpoints.io.safetensors_header import COPY_AGAIN, read_table
from hyper_merge.errors import CheckpointError

__all__ = ["CheckpointReader", "Header", "TensorInfo", "read_header"]

_PICKLED: Final = (".ckpt", ".pt", ".pth")
_ACCEPTED: Final = "choose a .safetensors or .ckpt file"


def read_header(path: str | os.PathLike[str]) -> Header:
    """Returns keys, types, shapes and metadata of a checkpoint file, without any tensor's data.

    Keys are the standard ones (`with_standard_keys`), whichever of several the file has. The suffix
    decides the kind of file, in any case of letters: .safetensors; .ckpt, .pt, .pth.

    Raises:
        CheckpointError: the file is missing, not a file, empty, unreadable, damaged, or of a kind
            that is not read.
    """
    path = Path(path)
    status = status_of(path)
    stamp = stamp_of(status)
    return _header_as_of(path, stamp) if is_settled(stamp) else _header_now(path, status)


@functools.lru_cache(maxsize=256)
def _header_as_of(path: Path, _stamp: Stamp) -> Header:
    """Returns the header that a file has as long as its stamp stays the same."""
    return _with_shared_tensors(_header_now(path, status_of(path)))


def _with_shared_tensors(header: Header) -> Header:
    """Returns the header with the table of tensors of another one that has the same, to save memory."""
    return replace(header, tensors=_shared(TensorsAsKey(header)).tensors)


@functools.lru_cache(maxsize=32)
def _shared(key: TensorsAsKey) -> Header:
    return key.header


def _header_now(path: Path, status: os.stat_result) -> Header:
    pickled = _is_pickled(path)
    try:
        if pickled:
            return with_standard_keys(_pickled_header(path, status, load_pickled(path)))
        table = read_table(path, status.st_size)
    except OSError as error:
        raise unreadable(path, error) from error
    except CheckpointError as error:
        error.file = path  # which is read by its name alone there
        raise
    header = Header(
        path=path,
        tensors=table.tensors,
        metadata=table.metadata,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        unsupported=table.unsupported,
    )
    return with_standard_keys(header)


class CheckpointReader:
    """A checkpoint file open for reading, tensor by tensor; use as a context manager.

        with CheckpointReader(path) as checkpoint:
            weight = checkpoint.tensor("model.diffusion_model.out.2.weight")

    Tensors are views of the mapped file: nothing may be written into them, which would end the
    process. They stay usable when the block is left, and keep the file mapped until then.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        expected: Header | None = None,
        *,
        replaced_whole: bool = False,
        mapped: bool = True,
    ) -> None:
        """Names the file; nothing is read before the block is entered.

        Args:
            path: the file.
            expected: the header as it was read earlier; saves reading it again, and a file that
                changed since then is refused.
            replaced_whole: nobody writes into the file, at most another one takes its place or it is
                deleted: what is mapped stays what it was, whatever becomes of the path.
            mapped: false for a few small tensors: a mapping reads a multiple of them from the disk.
        """
        self.path = Path(path)
        self._header = expected
        self._replaced_whole = replaced_whole
        self._tensors = MappedTensors(self.path) if mapped else ReadTensors(self.path)
        self._get: Callable[[str], Tensor] | None = None
        self._resources = ExitStack()

    def __enter__(self) -> CheckpointReader:
        header = self._header or read_header(self.path)
        try:
            self._get = self._open()
        except OSError as error:
            raise unreadable(self.path, error) from error
        self._header = header
        try:
            require_unchanged(header)
        except CheckpointError:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    @property
    def header(self) -> Header:
        """Keys, types, shapes and metadata; known once the block is entered."""
        if self._header is None:
            raise CheckpointError(
                f"{self.path.name} is not open", hint="use it in a with block", file=self.path
            )
        return self._header

    def tensor(self, key: str) -> Tensor:
        """Returns a tensor in its stored type and the header's shape, a view of the mapped file.

        8-bit floats are returned as float16, which holds them exactly, weights with a scale as float32.

        Raises:
            CheckpointError: no such key, a type that torch does not know, the file changed since
                its header was read, cannot be read, or is closed.
        """
        if self._get is None:
            raise CheckpointError(
                f"{self.path.name} is closed",
                hint="read tensors inside of its block",
                file=self.path,
            )
        header = self.header
        if key in header.unsupported:
            stored = header.unsupported[key]
            raise CheckpointError(
                f"{key} in {self.path.name} is stored as {stored}, unknown to torch"
                f" {torch.__version__}",
                hint="use an fp16 or fp32 version of the file",
                file=self.path,
                key=key,
            )
        if key not in header.tensors:
            raise CheckpointError(
                f"{self.path.name} has no tensor {key!r}", file=self.path, key=key
            )
        if not self._replaced_whole:
            require_unchanged(header)
        try:
            return _computable(key, header, self._get)
        except OSError as error:
            raise unreadable(self.path, error) from error

    def _open(self) -> Callable[[str], Tensor]:
        if _is_pickled(self.path):
            return load_pickled(self.path).__getitem__
        self._resources.enter_context(self._tensors)
        return self._tensors.get

    def _close(self) -> None:
        self._get = None
        self._resources.close()


def _computable(key: str, header: Header, get: Callable[[str], Tensor]) -> Tensor:
    tensor = get(header.stored.get(key, key))
    if key in header.scales:
        scale = get(header.scales[key]).float()
        rows = tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]
        tensor = (rows.float() * scale.reshape(-1, 1)).view(tensor.shape)
    elif tensor.dtype in EIGHT_BIT_FLOATS:
        tensor = tensor.half()
    tensor = tensor.mT.contiguous() if key in header.transposed else tensor
    return tensor.reshape(header.tensors[key].shape)


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
        raise CheckpointError(f"{path} is a folder, not a checkpoint", hint=_ACCEPTED, file=path)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(
            f"{path} is a device or pipe, not a checkpoint", hint=_ACCEPTED, file=path
        )
    if status.st_size == 0:
        raise CheckpointError(f"{path} is empty", hint=COPY_AGAIN, file=path)
    return status


def _is_pickled(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        raise CheckpointError(
            f"{path.name} is a quantised GGUF file, which cannot be merged",
            hint=_ACCEPTED,
            file=path,
        )
    if suffix != ".safetensors" and suffix not in _PICKLED:
        raise CheckpointError(
            f"{path.name} has the suffix {suffix!r}, which is not read", hint=_ACCEPTED, file=path
        )
    return suffix in _PICKLED


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Returns the refusal of a file for what the operating system says of it."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return CheckpointError(f"{path} does not exist", hint="check the path", file=path)
    if isinstance(error, PermissionError):
        return CheckpointError(
            f"{path} may not be read: permission denied", hint="check its rights", file=path
        )
    return CheckpointError(f"{path} cannot be read: {error.strerror or error}", file=path)


def _pickled_header(path: Path, status: os.stat_result, tensors: dict[str, Tensor]) -> Header:
    dense = {k: t for k, t in tensors.items() if t.layout == torch.strided and not t.is_quantized}
    return Header(
        path=path,
        tensors={key: TensorInfo(t.dtype, tuple(t.shape)) for key, t in dense.items()},
        metadata={},
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        unsupported={key: str(t.dtype) for key, t in tensors.items() if key not in dense},
    )
