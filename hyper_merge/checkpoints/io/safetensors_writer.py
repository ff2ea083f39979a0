"""Writes a .safetensors file: its exact header first, then tensors in any order, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from torch import Tensor

from hyper_merge.checkpoints.io.atomic_file import StagedFile
from hyper_merge.checkpoints.io.dtypes import ALIGNMENT_ORDER, STORED_NAMES
from hyper_merge.checkpoints.io.header import TensorInfo
from hyper_merge.checkpoints.io.safetensors_header import LENGTH_BYTES, METADATA_KEY

_ALIGNMENT: Final = 8  # bytes; the library pads its header to it as well
_FORMAT: Final = {"format": "pt"}


class SafetensorsWriter:
    """A .safetensors file being written; use as a context manager.

        with SafetensorsWriter(path, tensors, metadata) as writer:
            writer.write("key", tensor)  # every key of `tensors` once, in any order

    Leaving the block puts the file in its place; leaving it by an exception removes every trace and
    an existing file stays as it was. A misuse (a bug of the caller) is a `ValueError`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, str],
        *,
        overwrite: bool = True,
        deferred: bool = False,
        owner: str | None = None,
    ) -> None:
        """Fixes the header; nothing is written before the block is entered.

        Args:
            path: where the file is to appear.
            tensors: key to type and shape of everything that will be written.
            metadata: text by name; `"format": "pt"` is added.
            overwrite: whether an existing file may be replaced.
            deferred: leaving the block only finishes the temporary file; `staged.commit()` or
                `FileTransaction` puts it in place.
            owner: digits of the transaction that it belongs to, if any.

        Raises:
            TypeError: metadata that is not text.
            ValueError: a type that .safetensors files cannot hold, or text that is not Unicode.
        """
        self.path = Path(path)
        self.metadata: Mapping[str, str] = dict(metadata)
        self._tensors = dict(tensors)
        self._overwrite = overwrite
        self._deferred = deferred
        self._owner = owner
        self._offsets = _offsets(tensors)
        self._header = _header_bytes(tensors, self._offsets, metadata)
        self._pending = set(tensors)
        self._staged: StagedFile | None = None

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self._header) + sum(info.nbytes for info in self._tensors.values())

    @property
    def staged(self) -> StagedFile:
        """The temporary file; `staged.temporary` may be read (hashed) once the block is left."""
        if self._staged is None:
            raise ValueError(f"{self.path.name} is not being written; enter the with block first")
        return self._staged

    def __enter__(self) -> SafetensorsWriter:
        """Creates the temporary file with its header and all its space.

        Raises:
            OutputError: the place is taken, the folder is missing or read-only, the disk is full.
        """
        self._staged = StagedFile(
            self.path, overwrite=self._overwrite, size=self.size, owner=self._owner
        )
        try:
            self._staged.create()
            self._staged.write_at(memoryview(self._header), 0)
        except BaseException:
            self._staged.discard()
            raise
        return self

    def write(self, key: str, tensor: Tensor) -> None:
        """Writes one tensor, cast to its declared type; from any device, any thread.

        Raises:
            ValueError: the key was not declared or is written already, or the shape is another.
            OutputError: the disk is full or fails.
        """
        if key not in self._tensors:
            raise ValueError(f"{key!r} was not declared for {self.path.name}")
        info = self._tensors[key]
        if tuple(tensor.shape) != info.shape:
            raise ValueError(f"{key!r} was declared {info.shape}, got {tuple(tensor.shape)}")
        if key not in self._pending:
            raise ValueError(f"{key!r} is written already")
        data = tensor_bytes(tensor, info.dtype)
        self.staged.write_at(data, len(self._header) + self._offsets[key][0])
        self._pending.remove(key)

    def finish(self) -> None:
        """Checks that all is written and closes the temporary file; the place is untouched.

        Raises:
            ValueError: tensors are missing.
            OutputError: the disk fails.
        """
        if self._pending:
            raise ValueError(
                f"{self.path.name} lacks {len(self._pending)} of {len(self._tensors)} declared"
                f" tensors (first: {min(self._pending)})"
            )
        self.staged.seal()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.staged.discard()
            return
        try:
            self.finish()
            if not self._deferred:
                self.staged.commit()
        except BaseException:
            self.staged.discard()
            raise


def tensor_bytes(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    """Returns a tensor's bytes in `dtype`, row by row; a view of its memory where nothing changes."""
    flat = tensor.detach().to(device="cpu", dtype=dtype).contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def file_size(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> int:
    """Returns the bytes of the whole file that a writer with this header makes."""
    header = _header_bytes(tensors, _offsets(tensors), metadata)
    return len(header) + sum(info.nbytes for info in tensors.values())


def content_sha256(
    tensors: Mapping[str, Tensor],
    declared: Mapping[str, TensorInfo],
    tick: Callable[[int], None] = lambda _count: None,
) -> str:
    """Returns the `tensor_data_sha256` of a file (64 hex digits) before it is written.

    It lets a file carry the hash of its tensors in its own metadata.

    Args:
        tensors: key to tensor, as they will be given to the writer.
        declared: key to type and shape, as the writer is made with.
        tick: receives the number of bytes of every tensor; may raise, to stop.
    """
    digest = hashlib.sha256()
    for key in _file_order(declared):
        digest.update(tensor_bytes(tensors[key], declared[key].dtype))
        tick(declared[key].nbytes)
    return digest.hexdigest()


def _file_order(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Returns the keys in the library's order: widest type first, so that data is aligned; then by name."""
    unknown = [key for key, info in tensors.items() if info.dtype not in ALIGNMENT_ORDER]
    if unknown:
        raise ValueError(f"{unknown[0]!r}: no .safetensors file holds {tensors[unknown[0]].dtype}")
    return sorted(tensors, key=lambda key: (-ALIGNMENT_ORDER[tensors[key].dtype], key))


def _offsets(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, int]]:
    """Returns first byte and end of the data by key, counted from the beginning of all data."""
    offsets, end = {}, 0
    for key in _file_order(tensors):
        start, end = end, end + tensors[key].nbytes
        offsets[key] = (start, end)
    return offsets


def _header_bytes(
    tensors: Mapping[str, TensorInfo],
    offsets: Mapping[str, tuple[int, int]],
    metadata: Mapping[str, str],
) -> bytes:
    """Returns length and JSON text, padded with blanks so that the data begins aligned."""
    if METADATA_KEY in tensors:
        raise ValueError(f"no tensor can be named {METADATA_KEY}")
    for name, value in metadata.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"metadata must be text, {name!r} is {type(value).__name__}")
    table: dict[str, Any] = {METADATA_KEY: {**_FORMAT, **metadata, **_FORMAT}}
    for key, span in offsets.items():
        info = tensors[key]
        table[key] = {
            "dtype": STORED_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": list(span),
        }
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
