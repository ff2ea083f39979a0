"""The header of a checkpoint file, known before any tensor is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorInfo:
    """Type and shape of a stored tensor."""

    dtype: torch.dtype
    shape: Shape

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """A file's table of contents, with size and time of change, by which a changed file is noticed.

    Keys are the standard ones; `stored` has the file's where it is another.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]  # in the file's order
    metadata: Mapping[str, str]
    size: int  # bytes of the whole file
    mtime_ns: int
    unsupported: Mapping[str, str] = field(default_factory=dict)  # key -> type unknown to torch
    # key -> several in the file, whose rows are one matrix's or bias's in this order
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    turned: frozenset[str] = frozenset()  # keys of tensors whose halves the file has the other way
    stored: Mapping[str, str] = field(default_factory=dict)  # key -> another one in the file
    scales: Mapping[str, str] = field(default_factory=dict)  # key -> the file's, of its factor
    transposed: frozenset[str] = frozenset()  # keys of matrices that the file has the other way
    rounded_as: tuple[str, ...] = ()  # kinds of blocks in a GGUF file, the most numerous first

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.path.name

    @property
    def stem(self) -> str:
        """The file's name without folder and suffix."""
        return self.path.stem

    @property
    def shapes(self) -> dict[str, Shape]:
        """The tensors' shapes by key."""
        return {key: info.shape for key, info in self.tensors.items()}


@dataclass(frozen=True, eq=False)
class TensorsAsKey:
    """A header as the key of a cache: equal to another of the same tensors in the same order.

    Most files of a family have the same: what follows from these alone need be found out only once.
    """

    header: Header

    def __hash__(self) -> int:
        tensors = self.header.tensors
        return hash((len(tensors), next(iter(tensors), "")))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorsAsKey) and self._content() == other._content()

    def _content(self) -> tuple[list[object], Mapping[str, str]]:
        return list(self.header.tensors.items()), self.header.unsupported
