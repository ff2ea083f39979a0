"""Reads the tensors of a .ckpt file (a pickle) without ever running what it asks for.

torch's `weights_only` loader accepts tensors and plain containers; where it refuses a file, the restricted
unpickler takes what training programs leave beside the weights for inert stand-ins.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from hyper_merge.checkpoints.io.mapped_tensors import map_file
from hyper_merge.checkpoints.io.restricted_unpickler import RESTRICTED_PICKLE
from hyper_merge.checkpoints.io.safetensors_header import COPY_AGAIN, LENGTH_BYTES
from hyper_merge.errors import CheckpointError

_NESTED: Final = ("state_dict", "model", "module")  # under which training programs put the weights
_DEEPEST: Final = 4  # wrappers around one another
_FORBIDDEN: Final = re.compile(r"(?:GLOBAL|[Uu]nsupported class) ([\w.]+)")
# What damaged bytes make torch's and pickle's readers raise; never caught around our own code.
_LOAD_ERRORS: Final = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    OverflowError,
    AssertionError,
    ImportError,
    MemoryError,  # a damaged length
    struct.error,
)


def load_pickled(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file by key, mapped from the file where its format allows.

    A nested `state_dict`, `model` or `module` is unwrapped, also within another, and values that are no tensors are left out. Where no tensor
    stands at the top, those one level deeper are named `outer.inner`, so that a textual-inversion
    embedding is recognised by its keys.

    Raises:
        CheckpointError: the pickle asks for anything but tensors and plain containers, is damaged,
            or holds no tensor.
        OSError: the file cannot be read.
    """
    data = _load(path)
    if not isinstance(data, Mapping):
        kind = type(data).__name__
        raise CheckpointError(
            f"{path.name} holds a {kind}, not a state dict of tensors by key", file=path
        )
    tensors = _tensors(_unwrapped(data)) or _one_deeper(data)
    if not tensors:
        raise CheckpointError(
            f"{path.name} holds no tensor", hint="choose a full checkpoint", file=path
        )
    return tensors


def _load(path: Path) -> Any:
    with path.open("rb") as stream:
        head = stream.read(LENGTH_BYTES + 2)
        if head[LENGTH_BYTES:] == b'{"':
            raise CheckpointError(
                f"{path.name} is a .safetensors file by its content", hint="rename it so", file=path
            )
        load = _load_mapped if _holds_plain_records(stream) else _load_whole
        stream.seek(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's notes to programmers, not to users
                return load(stream)
        except _LOAD_ERRORS as error:
            raise _refusal(path, error) from error


def _holds_plain_records(stream: BinaryIO) -> bool:
    """Tells whether a file is a zip archive without compression: of torch since 1.6, as it was written."""
    try:
        with zipfile.ZipFile(stream) as archive:
            return all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error):
        return False


def _load_mapped(stream: BinaryIO) -> Any:
    """Loads an archive whose tensors are views of the file, by a mapping of ours.

    With `mmap` torch would map the file privately, as the library of .safetensors files does.
    """
    content = map_file(stream, os.fstat(stream.fileno()).st_size)
    load = partial(
        torch.serialization._load,
        map_location="cpu",
        overall_storage=torch.from_numpy(content).untyped_storage(),
        encoding="utf-8",  # as torch reads the text of Python 2
    )
    with torch.serialization._open_zipfile_reader(stream) as archive:
        try:
            return load(archive, pickle_module=torch._weights_only_unpickler)
        except (pickle.UnpicklingError, RuntimeError):  # the latter by torch 2.1
            return load(archive, pickle_module=RESTRICTED_PICKLE)


def _load_whole(stream: BinaryIO) -> Any:
    """Loads a file into memory: of torch before 1.6, or an archive that something compressed."""
    # Not `torch.load`: A1111 replaces it by a function that returns None for what it refuses.
    load = partial(torch.serialization.load, stream, map_location="cpu")
    try:
        return load(weights_only=True)
    except pickle.UnpicklingError:
        stream.seek(0)
        # Without `weights_only` torch would unpack an archive of its first years into a folder.
        if tarfile.is_tarfile(stream):
            raise
        stream.seek(0)
        return load(weights_only=False, pickle_module=RESTRICTED_PICKLE)


def _refusal(path: Path, error: Exception) -> CheckpointError:
    forbidden = _FORBIDDEN.search(str(error))
    if forbidden:
        return CheckpointError(
            f"{path.name} is not loaded: its pickle asks for {forbidden[1]}, and pickles can"
            " run any program",
            hint="convert it to .safetensors with a tool that you trust",
            file=path,
        )
    reason = str(error).strip().split("\n", 1)[0][:200] or type(error).__name__
    return CheckpointError(
        f"{path.name} is damaged or not a .ckpt file of tensors ({reason})",
        hint=f"{COPY_AGAIN}, or convert it to .safetensors with a tool that you trust",
        file=path,
    )


def _unwrapped(data: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Returns the innermost mapping that is wrapped as training programs do, or the mapping itself."""
    for _ in range(_DEEPEST):
        nested = next((data[key] for key in _NESTED if isinstance(data.get(key), Mapping)), None)
        if nested is None:
            break
        data = nested
    return data


def _tensors(data: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {
        key: value.detach()  # a Parameter would record gradients
        for key, value in data.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }


def _one_deeper(data: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {
        f"{outer}.{inner}": tensor
        for outer, value in data.items()
        if isinstance(value, Mapping)
        for inner, tensor in _tensors(value).items()
    }
