"""Reads the LoRA files that Hyper-Merge writes, with all their shapes, types and alphas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.architectures.spec import Family
from hyper_merge.checkpoints.io.dtypes import EIGHT_BIT_FLOATS
from hyper_merge.checkpoints.io.header import Header, Shape, TensorInfo
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.errors import CheckpointError
from hyper_merge.loras.lora_file import ALPHA, WHOLE

_NOTHING: Final = TensorInfo(torch.float32, ())


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
        stored = {tensors[m.up_key].dtype for m in self.modules.values() if not m.whole}
        return {torch.float16 if dtype in EIGHT_BIT_FLOATS else dtype for dtype in stored}

    def factors(self, module: str) -> tuple[Tensor, Tensor]:  # (m, r), (r, n), float64
        """Returns factors of what a host adds at multiplier 1, with rounding and alpha included.

        Raises:
            CheckpointError: the file changed, or holds an alpha that is no positive number.
        """
        layer = self.modules[module]
        if layer.whole:
            m, n = layer.m, layer.n
            change = self._file.tensor(module + WHOLE).double().view(m, n)
            return (change, torch.eye(n).double()) if n <= m else (torch.eye(m).double(), change)
        up = self._file.tensor(layer.up_key).double().flatten(1)
        down = self._file.tensor(layer.down_key).double().flatten(1)
        root = math.sqrt(self._scale(module))
        return up * root, down * root

    def _scale(self, module: str) -> float:
        if module + ALPHA not in self._file.header.tensors:
            return 1.0
        tensor = self._file.tensor(module + ALPHA)
        alpha = float(tensor) if tensor.numel() == 1 and tensor.is_floating_point() else math.nan
        if not 0 < alpha < math.inf:
            raise CheckpointError(
                f"{self.path.name} has the alpha {alpha} in {module}, expected a number above 0",
                hint="use another",
            )
        return alpha / self.ranks[module]

    def require_layer(self, layer: Layer) -> None:
        """Returns if the module of a layer is of the layer's size, or the file has none.

        Raises:
            CheckpointError: it is the module of another network.
        """
        module = self.modules.get(layer.module)
        if module and (module.m, module.n) != (layer.m, layer.n):
            raise CheckpointError(
                f"{layer.module} in {self.path.name} is {module.m} x {module.n}, expected"
                f" {layer.m} x {layer.n}",
                hint="use a LoRA of the same architecture",
                file=self.path,
                key=layer.module,
            )

    def _read_modules(self, header: Header) -> None:
        modules, ranks = {}, {}
        for key, info in header.tensors.items():
            if key.endswith(WHOLE):
                module = key.removesuffix(WHOLE)
                _require(bool(info.shape) and _is_float(info), header, module)
                modules[module] = layer = self._layer(module, info.shape, whole=True)
                ranks[module] = min(layer.m, layer.n)
            spelling = self._family.lora_spelling
            if not key.endswith(spelling.down):
                continue
            module = key.removesuffix(spelling.down)
            up = header.tensors.get(module + spelling.up, _NOTHING)
            _require(_fit_together(up, info), header, module)
            modules[module] = self._layer(module, (*up.shape[:1], *info.shape[1:]))
            ranks[module] = info.shape[0]
        self.modules, self.ranks = modules, ranks

    def _layer(self, module: str, shape: Shape, *, whole: bool = False) -> Layer:
        try:
            part = self._family.part_of(module)
        except ValueError as error:
            raise CheckpointError(
                f"{self.path.name}: {error}",
                hint="use a LoRA of the same architecture",
                file=self.path,
                key=module,
            ) from error
        spelling = self._family.lora_spelling
        return Layer(module, module, part, shape, whole=whole, spelling=spelling)


def _fit_together(up: TensorInfo, down: TensorInfo) -> bool:
    """Tells whether factors can be multiplied: numbers (m, r, ...) with (r, ...), of a rank above 0."""
    if len(up.shape) < 2 or len(down.shape) < 2 or not (_is_float(up) and _is_float(down)):
        return False
    return math.prod(up.shape[1:]) == down.shape[0] > 0


def _is_float(info: TensorInfo) -> bool:
    return info.dtype.is_floating_point


def _require(is_sound: bool, header: Header, module: str) -> None:
    if not is_sound:
        raise CheckpointError(
            f"{header.name} is no whole LoRA: {module} has half of its factors, or factors that do"
            " not fit together or are no floating-point numbers",
            hint="use another",
            file=header.path,
            key=module,
        )
