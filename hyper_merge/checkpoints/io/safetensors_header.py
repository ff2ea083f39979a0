"""Reads and validates the table of contents of a .safetensors file, without the tensors' data.

It is as strict as the library: tensors fill the file without gap or overlap. The format: 8 bytes length n
(little-endian), n bytes of JSON, the tensors' bytes.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from hyper_merge.checkpoints.io.dtypes import STORED_BITS, TORCH_DTYPES
from hyper_merge.checkpoints.io.header import TensorInfo
from hyper_merge.errors import CheckpointError

LENGTH_BYTES: Final = 8
METADATA_KEY: Final = "__metadata__"
COPY_AGAIN: Final = "download or copy it again"

_MAX_HEADER_BYTES: Final = 100_000_000  # the library's own limit
_MAX_DIMENSION: Final = 2**63 - 1
_IMPOSTORS: Final = (
    # first bytes, what such a file is
    (b"PK\x03\x04", "a zip archive as torch.save writes; rename it to .ckpt"),
    (b"\x80", "a pickle as torch.save writes; rename it to .ckpt"),
    (b"GGUF", "a GGUF file; rename it to .gguf"),
    (b"<", f"a web page; {COPY_AGAIN}, logged in where the site asks for it"),
    (b"version ", f"a Git LFS pointer; {COPY_AGAIN} with Git LFS"),
)


# One object for all tensors of a type and shape: that takes less memory, and compares at once.
_info = functools.lru_cache(maxsize=8192)(TensorInfo)


@dataclass(frozen=True)
class SafetensorsTable:
    """The tensors and metadata of a .safetensors file and where the tensors' bytes begin."""

    tensors: dict[str, TensorInfo]
    starts: dict[str, int]  # key -> first byte, from the beginning of the file
    unsupported: dict[str, str]  # key -> stored type that torch here does not know
    metadata: dict[str, str]
    data_start: int  # bytes from the beginning of the file


class _Entry(NamedTuple):
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the data
    end: int


def read_table(path: Path, size: int) -> SafetensorsTable:
    """Returns the validated table of contents; reads nothing beyond the header.

    Args:
        path: the file.
        size: bytes of the whole file.

    Raises:
        CheckpointError: the file is no .safetensors file, damaged or truncated.
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        return read_table_from(stream, path.name, size)


def read_table_from(stream: BinaryIO, name: str, size: int) -> SafetensorsTable:
    """Does what `read_table` does for an open file, from its beginning."""
    start, text = read_header_bytes(stream, name, size)
    return _table(text, start, name, size)


@functools.lru_cache(maxsize=2)  # who reads a header often opens the file for its tensors next
def _table(text: bytes, start: int, name: str, size: int) -> SafetensorsTable:
    table = _parse(text, name)
    metadata = _metadata(table.pop(METADATA_KEY, {}), name)
    entries = [_entry(key, value, name) for key, value in table.items()]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    _require_filled(entries, start, size, name)
    known = [entry for entry in entries if entry.dtype in TORCH_DTYPES]
    return SafetensorsTable(
        tensors={e.key: _info(TORCH_DTYPES[e.dtype], e.shape) for e in known},
        starts={e.key: start + e.start for e in known},
        unsupported={e.key: e.dtype for e in entries if e.dtype not in TORCH_DTYPES},
        metadata=metadata,
        data_start=start,
    )


def read_header_bytes(stream: BinaryIO, name: str, size: int) -> tuple[int, bytes]:
    """Returns the byte at which the tensors begin, where it leaves the stream, and the header's JSON text.

    Raises:
        CheckpointError: the length is impossible, or no JSON object follows.
    """
    first = stream.read(LENGTH_BYTES)
    for magic, kind in _IMPOSTORS:
        if first.startswith(magic) and not _plausible(first, size):
            raise CheckpointError(f"{name} is not a .safetensors file but {kind}")
    if len(first) < LENGTH_BYTES:
        raise _damaged(name, f"only {size} bytes, less than the shortest header")
    length = int.from_bytes(first, "little")
    if length > _MAX_HEADER_BYTES:
        raise _damaged(name, f"header of {length:,} bytes, more than {_MAX_HEADER_BYTES:,}")
    if length > size - LENGTH_BYTES:
        raise _truncated(name, LENGTH_BYTES + length, size)
    text = stream.read(length)
    if not text.startswith(b"{"):
        raise _damaged(name, "its header does not begin with '{'")
    return LENGTH_BYTES + length, text


def _plausible(first: bytes, size: int) -> bool:
    """Tells whether the first bytes can be a header's length: no magic number survives this in practice."""
    length = int.from_bytes(first, "little")
    return len(first) == LENGTH_BYTES and length <= min(_MAX_HEADER_BYTES, size)


def _damaged(name: str, why: str) -> CheckpointError:
    return CheckpointError(f"{name} is damaged or not a .safetensors file: {why}", hint=COPY_AGAIN)


def _truncated(name: str, expected: int, size: int) -> CheckpointError:
    return CheckpointError(
        f"{name} is truncated: by its header it has {expected:,} bytes, there are {size:,}",
        hint=f"wait if it is still being written, else {COPY_AGAIN}",
    )


def _parse(text: bytes, name: str) -> dict[str, Any]:
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        if b"\\u" in text:  # half of a surrogate pair could never be written or shown
            json.dumps(table, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise _damaged(name, f"its header is not JSON ({error})") from error
    if not isinstance(table, dict):
        raise _damaged(name, "its header is not a JSON object")
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a key stands twice")
    return table


def _metadata(value: object, name: str) -> dict[str, str]:
    if value is None:  # as some tools write "no metadata"; the library takes it too
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _damaged(name, f"its {METADATA_KEY} holds something else than text")
    return value


def _entry(key: str, value: object, name: str) -> _Entry:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise _damaged(name, f"its entry for {key!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or not _naturals(shape) or not _naturals(offsets):
        raise _damaged(name, f"its entry for {key!r} is malformed")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(name, f"the offsets of {key!r} are not a range: {offsets}")
    entry = _Entry(key, dtype, tuple(shape), *offsets)
    _require_size(entry, name)
    return entry


def _naturals(value: object) -> bool:
    # By type: JSON's true is an int in Python.
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        return False
    return not value or (min(value) >= 0 and max(value) <= _MAX_DIMENSION)


def _require_size(entry: _Entry, name: str) -> None:
    bits = STORED_BITS.get(entry.dtype)
    if bits is None:
        return  # a type of the future: it counts as unsupported, of any size
    expected = -(-math.prod(entry.shape) * bits // 8)
    if entry.end - entry.start != expected:
        raise _damaged(
            name,
            f"{entry.key!r} of type {entry.dtype} and shape {list(entry.shape)} needs"
            f" {expected:,} bytes, its offsets span {entry.end - entry.start:,}",
        )


def _require_filled(entries: Iterable[_Entry], start: int, size: int, name: str) -> None:
    """Returns if the tensors follow each other without gap or overlap up to the end of the file."""
    end = 0
    for entry in entries:
        if entry.start != end:
            fault = "overlaps the one before" if entry.start < end else "leaves a gap"
            raise _damaged(
                name, f"the data of {entry.key!r} {fault} ({entry.start:,}, not {end:,})"
            )
        end = entry.end
    if start + end > size:
        raise _truncated(name, start + end, size)
    if start + end < size:
        raise _damaged(name, f"{size - start - end:,} bytes beyond the last tensor")
