"""Reads GGUF files, whose weights are rounded in blocks of a few bits, through the package `gguf`."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from hyper_merge.checkpoints.io.file_stamp import Stamp, stamp_of
from hyper_merge.checkpoints.io.header import Shape, TensorInfo
from hyper_merge.checkpoints.io.safetensors_header import COPY_AGAIN
from hyper_merge.errors import CheckpointError

GGUF: Final = ".gguf"

_IN_FORGE_NEO: Final = "modules_forge.packages.gguf"
_INSTALL: Final = "run: python -m pip install -c constraints.txt -e '.[gguf]'"
_OTHER_VERSION: Final = "use a version of Q4 or more bits, or the fp16 .safetensors file"
# Kinds of blocks -> numbers that share a scale.
_BLOCKS: Final[Mapping[str, int]] = {
    "Q8_0": 32,
    "Q6_K": 16,
    "Q5_K": 32,
    "Q5_0": 32,
    "Q5_1": 32,
    "Q4_K": 32,
    "Q4_0": 32,
    "Q4_1": 32,
}
_PLAIN: Final = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_SHAPE: Final = "comfy.gguf.orig_shape."  # of tensors whose rows had to be cut to suit the blocks
_MOST_READS: Final = 400_000  # of numbers and texts before the tensors; models have some thousands

_SAMPLED_TENSORS, _SAMPLED_ROWS = 8, 64
_SAME: Final = 1e-5  # of the largest number: two that differ by less are one

# What damaged bytes make the package raise; never caught around our own code.
_READ_ERRORS: Final = (ValueError, TypeError, LookupError, OverflowError, MemoryError)


@dataclass(frozen=True, eq=False)
class _Stored:
    """A tensor as the file has it."""

    kind: str  # "Q4_K", "F16", ...
    shape: Shape
    data: np.ndarray[Any, Any]  # mapped

    @property
    def dtype(self) -> torch.dtype:
        """The type that the tensor counts as: rounded numbers are as float16 has them at most."""
        return _PLAIN.get(self.kind, torch.float16)


class GgufTensors:
    """The tensors of a file that stays mapped, by their keys; use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Names the file; nothing is read before the block is entered."""
        self.path = path
        self._tensors: dict[str, _Stored] = {}

    def __enter__(self) -> GgufTensors:
        """Maps the file.

        Raises:
            CheckpointError: the package is not there, the file is damaged, or rounded too coarsely.
            OSError: the file cannot be read or mapped.
        """
        self._tensors = _read(self.path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tensors = {}

    def infos(self) -> dict[str, TensorInfo]:
        """Returns type and shape of every tensor."""
        return {key: TensorInfo(x.dtype, x.shape) for key, x in self._tensors.items()}

    def kinds(self) -> tuple[str, ...]:
        """Returns the kinds of blocks of the file, the most numerous first; none in a plain file."""
        kinds = [x.kind for x in self._tensors.values() if x.kind in _BLOCKS]
        return tuple(sorted(set(kinds), key=lambda kind: (-kinds.count(kind), kind)))

    def get(self, key: str) -> Tensor:
        """Returns a tensor: float32 where it was rounded in blocks, else in its stored type.

        Raises:
            KeyError: the file has no such tensor.
        """
        stored = self._tensors[key]
        numbers = torch.from_numpy(_numbers(stored.kind, stored.data)).view(stored.shape)
        return numbers.to(_PLAIN[stored.kind]) if stored.kind in _PLAIN else numbers

    def rounding_error(self) -> float:
        """Returns about how far rounding moved the weights, as a share of their size, from samples.

        Within a block rounded numbers are a step apart, and their errors are uniform: a variance of
        a twelfth of the step's square.
        """
        rounded = [x for x in self._tensors.values() if x.kind in _BLOCKS]
        largest = sorted(rounded, key=lambda x: -x.data.size)[:_SAMPLED_TENSORS]
        errors, squares = 0.0, 0.0
        for stored in largest:
            rows = stored.data.reshape(-1, stored.data.shape[-1])[:_SAMPLED_ROWS]
            blocks = np.sort(_numbers(stored.kind, rows).reshape(-1, _BLOCKS[stored.kind]))
            gaps = np.diff(blocks)
            least = _SAME * np.abs(blocks).max(initial=0.0)
            steps = np.where(gaps > least, gaps, np.inf).min(axis=1)
            steps = steps[np.isfinite(steps)].astype(np.float64)
            errors += float((steps**2).sum()) * blocks.shape[1] / 12
            squares += float((blocks.astype(np.float64) ** 2).sum())
        return float(np.sqrt(errors / squares)) if squares else 0.0


def rounding_error(path: Path) -> float:
    """Returns `GgufTensors.rounding_error` of a file, remembered as long as it stays the same."""
    return _rounding_error(path, stamp_of(path.stat()))


@functools.lru_cache(maxsize=256)
def _rounding_error(path: Path, _stamp: Stamp) -> float:
    with GgufTensors(path) as tensors:
        return tensors.rounding_error()


def _read(path: Path) -> dict[str, _Stored]:
    try:
        gguf = _package()
    except ImportError as error:
        raise CheckpointError(
            f"{path.name} is a GGUF file: reading it needs the package gguf, which is not installed",
            hint=_INSTALL,
            file=path,
        ) from error
    try:
        reader = _bounded(gguf.GGUFReader)(os.fspath(path))
        tensors = {tensor.name: _stored(tensor, reader) for tensor in reader.tensors}
    except _READ_ERRORS as error:
        raise CheckpointError(
            f"{path.name} is no GGUF file, or a damaged one: {error}", hint=COPY_AGAIN, file=path
        ) from error
    for key, stored in tensors.items():
        if stored.kind not in _BLOCKS and stored.kind not in _PLAIN:
            raise CheckpointError(
                f"{key} in {path.name} is quantised as {stored.kind}, which is not read",
                hint=_OTHER_VERSION,
                file=path,
                key=key,
            )
    return tensors


def _package() -> Any:
    """Returns the package `gguf`, or the older copy that Forge or Forge Neo has of it.

    Raises:
        ImportError: there is none.
    """
    try:
        importlib.import_module("gguf.quants")
        return importlib.import_module("gguf")
    except ImportError:
        importlib.import_module(f"{_IN_FORGE_NEO}.quants")
        return importlib.import_module(_IN_FORGE_NEO)


@functools.cache
def _bounded(reader: type) -> type:
    """Returns the package's reader, which here neither reads beyond the end nor counts for ever.

    A damaged number of entries would keep the original busy until memory is full.
    """

    class Bounded(reader):  # type: ignore[misc]
        _reads = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **more: Any) -> Any:
            self._reads += 1
            if self._reads > _MOST_READS:
                raise ValueError("it describes more than an image model has")
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, *rest, **more)

    return Bounded


def _stored(tensor: Any, reader: Any) -> _Stored:
    shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
    field = reader.fields.get(_SHAPE + tensor.name)
    if field is not None:
        shape = tuple(int(field.parts[index][0]) for index in field.data)
    if np.prod(shape, dtype=object) != int(tensor.n_elements):
        raise ValueError(f"{tensor.name} has another number of entries than its shape")
    return _Stored(tensor.tensor_type.name, shape, tensor.data)


def _numbers(kind: str, data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    gguf = _package()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", RuntimeWarning
        )  # infinities, which are refused by key later
        numbers = gguf.quants.dequantize(np.asarray(data), gguf.GGMLQuantizationType[kind])
    return np.require(numbers, np.float32, ["C", "W"])
