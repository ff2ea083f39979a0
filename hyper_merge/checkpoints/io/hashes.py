"""Hashes by which WebUIs and sites know a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Final

from hyper_merge.checkpoints.io.safetensors_header import read_header_bytes
from hyper_merge.errors import CheckpointError

_CHUNK: Final = 4 * 2**20  # bytes
_LEGACY_OFFSET: Final = 0x100000
_LEGACY_BYTES: Final = 0x10000


def file_sha256(
    path: str | os.PathLike[str],
    tick: Callable[[int], None] = lambda _count: None,
) -> str:
    """Returns the SHA-256 of the whole file, 64 hex digits; the WebUI's short hash is its first 10.

    Args:
        path: the file.
        tick: receives the number of bytes of every chunk of up to 4 MiB; may raise, to stop.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            return _sha256_to_end(stream, tick)
    except OSError as error:
        raise _unreadable(path, error) from error


def tensor_data_sha256(
    path: str | os.PathLike[str],
    tick: Callable[[int], None] = lambda _count: None,
) -> str:
    """Returns the SHA-256 of the tensors' bytes alone, 64 hex digits: kohya's `sshs_model_hash`.

    Its first 12 digits are A1111's hash of a LoRA; edits of the metadata do not change it.

    Args:
        path: a .safetensors file.
        tick: receives the number of bytes of every chunk of up to 4 MiB; may raise, to stop.

    Raises:
        CheckpointError: the file cannot be read, or its header's length is impossible.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            read_header_bytes(stream, path.name, path.stat().st_size)
            return _sha256_to_end(stream, tick)
    except OSError as error:
        raise _unreadable(path, error) from error


def legacy_hash(path: str | os.PathLike[str]) -> str:
    """Returns A1111's old 8-digit model hash: SHA-256 of 64 KiB at 1 MiB into the file.

    Different merges often share it; good for lineage metadata, never for identity.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            stream.seek(_LEGACY_OFFSET)
            return hashlib.sha256(stream.read(_LEGACY_BYTES)).hexdigest()[:8]
    except OSError as error:
        raise _unreadable(path, error) from error


def _sha256_to_end(stream: BufferedReader, tick: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(_CHUNK))
    while count := stream.readinto(chunk):
        tick(count)
        digest.update(chunk[:count])
    return digest.hexdigest()


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {error.strerror or error}", file=path)
