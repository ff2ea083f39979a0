"""Reads the LoRA files that Hyper-Merge writes, with all their shapes, types and alphas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.architectures.spec import Family
from hyper_merge.checkpoints.io.dtypes import EIGHT_BIT_FLOATS
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.errors import CheckpointError
from hyper_merge.loras.lora_file import ALPHA, DOWN, UP, WHOLE


class LoraReader:
    """A LoRA file that is open for reading, module by module; use as a context manager."""

    modules: Mapping[str, Layer] = MappingProxyType({})
    """The layer that each module is added to, by its name; known once the block is entered."""

    ranks: Mapping[str, int] = MappingProxyType({})
    """The rank of each module; known once the block is entered."""

    def __init__(self, path: Path, family: Family) -> None:
        """Names the file; nothing is read before the block is entered."""
        self.path = path
        self._family = family
        self._file = CheckpointReader(path)

    def __enter__(self) -> LoraReader:
        self._file.__enter__()
        try:
            self._read_modules(self._file.header)
        except BaseException:
            self._file.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)

    @property
    def dtype(self) -> torch.dtype:
        """The type in which its factors can be stored again: float16 for 8-bit floats."""
        dtypes = self.dtypes
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The types in which its factors can be stored again; whole tensors have none."""
        tensors = self._file.header.tensors
        stored = {tensors[name + UP].dtype for name, m in self.modules.items() if not m.whole}
        return {torch.float16 if dtype in EIGHT_BIT_FLOATS else dtype for dtype in stored}

    def factors(self, module: str) -> tuple[Tensor, Tensor]:  # (m, r), (r, n), float64
        """Returns factors of what a host adds at multiplier 1, with rounding and alpha included.

        Raises:
            CheckpointError: the file changed, or holds an alpha that is no positive number.
        """
        if self.modules[module].whole:
            change = self._file.tensor(module + WHOLE).double().flatten(1)
            m, n = change.shape
            return (change, torch.eye(n).double()) if n <= m else (torch.eye(m).double(), change)
        up = self._file.tensor(module + UP).double().flatten(1)
        down = self._file.tensor(module + DOWN).double().flatten(1)
        root = math.sqrt(self._scale(module))
        return up * root, down * root

    def _scale(self, module: str) -> float:
        if module + ALPHA not in self._file.header.tensors:
            return 1.0
        alpha = float(self._file.tensor(module + ALPHA))
        if not 0 < alpha < math.inf:
            raise CheckpointError(
                f"{self.path.name} has the alpha {alpha} in {module}", hint="use another"
            )
        return alpha / self.ranks[module]

    def _read_modules(self, header: Header) -> None:
        modules, ranks = {}, {}
        for key, info in header.tensors.items():
            if key.endswith(WHOLE):
                module = key.removesuffix(WHOLE)
                part = self._family.part_of(module)
                modules[module] = layer = Layer(module, module, part, info.shape, whole=True)
                ranks[module] = min(layer.m, layer.n)
            if not key.endswith(DOWN):
                continue
            module = key.removesuffix(DOWN)
            up = header.tensors.get(module + UP)
            if up is None or len(up.shape) < 2 or up.shape[1] != info.shape[0]:
                raise CheckpointError(
                    f"{header.name} is no whole LoRA: {module} has half of its factors"
                )
            shape = (up.shape[0], *info.shape[1:])
            modules[module] = Layer(module, module, self._family.part_of(module), shape)
            ranks[module] = info.shape[0]
        self.modules, self.ranks = modules, ranks
