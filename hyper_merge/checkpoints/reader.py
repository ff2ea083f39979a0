"""Reads checkpoints: the table of contents alone, or tensor by tensor through a memory mapping."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Final

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.key_conversion import with_standard_keys
from hyper_merge.checkpoints.io.dtypes import EIGHT_BIT_FLOATS, widened
from hyper_merge.checkpoints.io.file_stamp import Stamp, is_settled, stamp_of
from hyper_merge.checkpoints.io.file_status import (
    ACCEPTED,
    require_unchanged,
    status_of,
    unreadable,
)
from hyper_merge.checkpoints.io.gguf_file import GGUF, GgufTensors
from hyper_merge.checkpoints.io.header import Header, TensorInfo, TensorsAsKey
from hyper_merge.checkpoints.io.mapped_tensors import MappedTensors, ReadTensors
from hyper_merge.checkpoints.io.pickle_reader import load_pickled
from hyper_merge.checkpoints.io.safetensors_header import read_table
from hyper_merge.errors import CheckpointError

__all__ = ["CheckpointReader", "Header", "TensorInfo", "read_header"]

_PICKLED: Final = (".ckpt", ".pt", ".pth")


def read_header(path: str | os.PathLike[str]) -> Header:
    """Returns keys, types, shapes and metadata of a checkpoint file, without any tensor's data.

    Keys are the standard ones (`with_standard_keys`), whichever of several the file has. The suffix
    decides the kind of file, in any case of letters: .safetensors; .ckpt, .pt, .pth; .gguf.

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
    suffix = _suffix(path)
    try:
        if suffix in _PICKLED:
            return with_standard_keys(_pickled_header(path, status, load_pickled(path)))
        if suffix == GGUF:
            return with_standard_keys(_gguf_header(path, status))
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
        sparse: bool = False,
    ) -> None:
        """Names the file; nothing is read before the block is entered.

        Args:
            path: the file.
            expected: the header as it was read earlier; saves reading it again, and a file that
                changed since then is refused.
            replaced_whole: nobody writes into the file, at most another one takes its place or it is
                deleted: what is mapped stays what it was, whatever becomes of the path.
            mapped: false for a few small tensors: a mapping reads a multiple of them from the disk.
            sparse: whether small parts of tensors will be used: then nothing is read ahead.
        """
        self.path = Path(path)
        self._header = expected
        self._replaced_whole = replaced_whole
        self._mapped = mapped
        self._sparse = sparse
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
        suffix = _suffix(self.path)
        if suffix in _PICKLED:
            return load_pickled(self.path).__getitem__
        if suffix == GGUF:
            return self._resources.enter_context(GgufTensors(self.path)).get
        if self._mapped:
            return self._resources.enter_context(MappedTensors(self.path, sparse=self._sparse)).get
        return self._resources.enter_context(ReadTensors(self.path)).get

    def _close(self) -> None:
        self._get = None
        self._resources.close()


def _computable(key: str, header: Header, get: Callable[[str], Tensor]) -> Tensor:
    if key in header.parts:
        tensor = torch.cat([_widened(get(part)) for part in header.parts[key]])
    else:
        tensor = get(header.stored.get(key, key))
    if key in header.scales:
        scale = get(header.scales[key]).float()
        rows = tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]
        tensor = (widened(rows) * scale.reshape(-1, 1)).view(tensor.shape)
    tensor = _widened(tensor)
    tensor = torch.cat(tensor.chunk(2)[::-1]) if key in header.turned else tensor
    tensor = tensor.mT.contiguous() if key in header.transposed else tensor
    return tensor.reshape(header.tensors[key].shape)


def _widened(tensor: Tensor) -> Tensor:
    """Returns 8-bit floats as float16, which holds them exactly; all else as it is."""
    return widened(tensor, torch.float16) if tensor.dtype in EIGHT_BIT_FLOATS else tensor


def _suffix(path: Path) -> str:
    """Returns the suffix of a checkpoint in small letters.

    Raises:
        CheckpointError: it is that of no kind of checkpoint.
    """
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", GGUF, *_PICKLED):
        raise CheckpointError(
            f"{path.name} has the suffix {suffix!r}, which is not read", hint=ACCEPTED, file=path
        )
    return suffix


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


def _gguf_header(path: Path, status: os.stat_result) -> Header:
    with GgufTensors(path) as tensors:
        return Header(
            path=path,
            tensors=tensors.infos(),
            metadata={},
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            rounded_as=tensors.kinds(),
        )
