"""Reads LoRA files of any trainer as factors under the names of one family's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.io.dtypes import EIGHT_BIT_FLOATS
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.errors import NonFiniteError
from hyper_merge.loras.adapters import matrix_factors
from hyper_merge.loras.input_modules import LoraModules, LoraPart, refused
from hyper_merge.loras.placement import place_factors

_MOST: Final = (
    1e4  # change of a weight, by one term: no host could compute with the next layer's values
)


class InputLora:
    """A LoRA file that is open for reading, module by module; use as a context manager.

    It gives what `LoraReader` gives of our own files.
    """

    def __init__(self, modules: LoraModules) -> None:
        """Takes the modules; nothing is read before the block is entered."""
        self.path: Path = modules.header.path
        self._modules = modules
        self._file = CheckpointReader(self.path, expected=modules.header)

    def __enter__(self) -> InputLora:
        self._file.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)

    @property
    def modules(self) -> Mapping[str, Layer]:
        """The layer that each module is added to, by its name in the family."""
        return MappingProxyType(self._modules.layers)

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """The most rank that each module has, by its shapes.

        Where a layer is several modules it is less if they share factors: these are read for it.
        """
        ranks = {
            module: self.factors(module, torch.float32)[0].shape[1]
            for module in self.modules
            if len(self._modules.parts_of(module)) > 1
        }
        return MappingProxyType(
            {name: min(ranks.get(name, most), most) for name, most in self._modules.ranks.items()}
        )

    @property
    def dtype(self) -> torch.dtype:
        """The type in which its factors can be stored again: float16 for 8-bit floats."""
        return stored_dtype([self._modules])

    def factors(
        self, module: str, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor]:  # (m, r), (r, n)
        """Returns factors of what a host adds at multiplier 1, with rounding and alpha included.

        Raises:
            CheckpointError: the file changed, or holds an alpha that is no positive number.
            NonFiniteError: a factor holds NaN or infinity, or values that no network can bear.
        """
        parts = self._modules.parts_of(module)
        return place_factors([(part.place, *self._part_factors(part, dtype)) for part in parts])

    def _part_factors(self, part: LoraPart, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys = part.spelled.keys
        tensors = {role: self._file.tensor(key).to(dtype) for role, key in keys.items()}
        scale = self._modules.scale(part, tensors.pop("alpha", None))
        up, down = matrix_factors(tensors)
        if not bool(up.sum().isfinite() and down.sum().isfinite()):
            self._require_finite(part, tensors)
        self._require_scale(part, scale * _largest(up) * _largest(down))
        return up * scale, down

    def require_layer(self, layer: Layer) -> None:
        """Returns if the module of a layer is of the layer's size, or the file has none.

        Raises:
            CheckpointError: it is the module of another network.
        """
        module = self.modules.get(layer.module)
        if module and (module.m, module.n) != (layer.m, layer.n):
            raise refused(
                self._modules.header,
                f"has {layer.module} of {module.m} x {module.n}, expected {layer.m} x {layer.n}",
            )

    def _require_scale(self, part: LoraPart, change: float) -> None:
        if not change <= _MOST:
            raise NonFiniteError(
                f"{self.path.name} is wildly off in scale: it changes weights by up to {change:.3g} in"
                f" {part.spelled.name}, where weights are below 1",
                hint="the copy is damaged: download it again, or leave it out",
                file=self.path,
                key=part.spelled.name,
            )

    def _require_finite(self, part: LoraPart, tensors: Mapping[str, Tensor]) -> None:
        for role, tensor in tensors.items():
            bad = int((~tensor.isfinite()).sum())
            if bad:
                key = part.spelled.keys[role]
                raise NonFiniteError(
                    f"{self.path.name} holds NaN or infinity in {bad} of {tensor.numel()} values of"
                    f" {key}",
                    hint="use an undamaged copy of the file, or leave it out",
                    file=self.path,
                    key=key,
                )


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().amax()) if tensor.numel() else 0.0


def stored_dtype(files: Sequence[LoraModules]) -> torch.dtype:
    """Returns the type that all factors of files have; float32 where they differ."""
    dtypes = {
        modules.header.tensors[key].dtype
        for modules in files
        for part in modules.parts
        for key in part.factor_keys
    }
    usable = {torch.float16 if dtype in EIGHT_BIT_FLOATS else dtype for dtype in dtypes}
    return usable.pop() if len(usable) == 1 else torch.float32
