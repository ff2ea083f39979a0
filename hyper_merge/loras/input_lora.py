"""Reads LoRA files of any trainer as factors under the names of one family's layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.io.dtypes import EIGHT_BIT_FLOATS
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.errors import CheckpointError, NonFiniteError
from hyper_merge.loras.adapters import MatrixShape, matrix_factors, matrix_shape
from hyper_merge.loras.input_keys import SpelledModule
from hyper_merge.loras.module_names import ModuleIndex
from hyper_merge.runtime.checked_json import parse_json

_ADAPTER: Final = "lora_adapter_metadata"  # of diffusers: the settings of PEFT
_LARGEST: Final = 1e6  # alpha, far beyond all that trainers take
_MOST: Final = (
    1e4  # change of a weight, by one term: no host could compute with the next layer's values
)
_EXPECTED: Final = f"expected a number above 0, {_LARGEST:,.0f} at most"
_COMPONENTS: Final = ("text_encoder_2", "text_encoder", "unet", "transformer")


class LoraModules:
    """The modules of a LoRA file, by their names in the family: read from its header alone."""

    def __init__(
        self, header: Header, modules: Sequence[SpelledModule], index: ModuleIndex
    ) -> None:
        """Finds every module's layer.

        Args:
            header: of the file.
            modules: of the file, as `split_keys` returns them.
            index: of the family's layers.

        Raises:
            CheckpointError: a module is unknown to the family, of another size, given twice, or has
                tensors that do not fit together; it is named.
        """
        self.header = header
        self.layers: dict[str, Layer] = {}
        self.ranks: dict[str, int] = {}
        self._spelled: dict[str, SpelledModule] = {}
        self._shapes: dict[str, MatrixShape] = {}
        for spelled in modules:
            self._add(spelled, index.find(spelled.name))

    def keys(self, module: str) -> Mapping[str, str]:
        """Returns the keys of a module's tensors by what they are."""
        return self._spelled[module].keys

    def scale(self, module: str, alpha: Tensor | None) -> float:
        """Returns what the product of a module's tensors is multiplied by.

        Without an alpha it is 1 in all programs, unless the file says the settings of PEFT.

        Raises:
            CheckpointError: the alpha is no number above 0.
        """
        divisor = self._shapes[module].divisor
        if divisor is None:
            return 1.0
        if alpha is None:
            return self._peft_scale(module, divisor)
        value = float(alpha) if alpha.numel() == 1 else math.nan
        if not 0 < value <= _LARGEST:
            raise CheckpointError(
                f"{self.header.name} has the alpha {value} in {module}, {_EXPECTED}",
                hint="use another",
                file=self.header.path,
                key=self.keys(module)["alpha"],
            )
        return value / divisor

    def _add(self, spelled: SpelledModule, layer: Layer | None) -> None:
        if layer is None:
            raise _refused(self.header, f"has the module {spelled.name}, unknown to this family")
        tensors = self.header.tensors
        for key in spelled.keys.values():
            is_number = key in tensors and (
                tensors[key].dtype.is_floating_point or key.endswith(".alpha")
            )
            if not is_number:
                raise _refused(self.header, f"stores {key} in a type that is no float")
        shapes = {role: tensors[key].shape for role, key in spelled.keys.items()}
        shape = matrix_shape(shapes)
        if shape is None:
            listed = ", ".join(f"{role} {tuple(size)}" for role, size in shapes.items())
            raise _refused(
                self.header,
                f"has tensors in {spelled.name} that do not fit together or lack a half: {listed}",
            )
        if (shape.m, shape.n) != (layer.m, layer.n):
            raise _refused(
                self.header,
                f"has {spelled.name} of {shape.m} x {shape.n}, expected {layer.m} x {layer.n}",
            )
        if layer.module in self._spelled:
            other = self._spelled[layer.module].name
            raise _refused(self.header, f"holds one module twice, as {other} and {spelled.name}")
        # Whole tensors and companions are a matter of what we write, not of what we read.
        self.layers[layer.module] = replace(layer, is_end=False, whole=False)
        self.ranks[layer.module] = shape.rank
        self._spelled[layer.module], self._shapes[layer.module] = spelled, shape

    def _peft_scale(self, module: str, rank: int) -> float:
        spelled = self._spelled[module].name
        component = next((c for c in _COMPONENTS if spelled.startswith(f"{c}.")), None)
        settings = _adapter_settings(self.header, component) if component else {}
        path = spelled.removeprefix(f"{component}.")
        alpha, patterns = settings.get("lora_alpha"), settings.get("alpha_pattern")
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            if path == pattern or path.endswith(f".{pattern}"):
                alpha = value
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            return 1.0
        if not 0 < alpha <= _LARGEST:
            raise _refused(
                self.header,
                f"says the alpha {str(alpha)[:20]} of {spelled} in its metadata, {_EXPECTED}",
            )
        return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


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

    @property
    def ranks(self) -> Mapping[str, int]:
        """The most rank that each module has, by its shapes."""
        return MappingProxyType(self._modules.ranks)

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
        tensors = {
            role: self._file.tensor(key).to(dtype)
            for role, key in self._modules.keys(module).items()
        }
        scale = self._modules.scale(module, tensors.pop("alpha", None))
        up, down = matrix_factors(tensors)
        if not bool(up.sum().isfinite() and down.sum().isfinite()):
            self._require_finite(module, tensors)
        self._require_scale(module, scale * _largest(up) * _largest(down))
        return up * scale, down

    def require_layer(self, layer: Layer) -> None:
        """Returns if the module of a layer is of the layer's size, or the file has none.

        Raises:
            CheckpointError: it is the module of another network.
        """
        module = self.modules.get(layer.module)
        if module and (module.m, module.n) != (layer.m, layer.n):
            raise _refused(
                self._modules.header,
                f"has {layer.module} of {module.m} x {module.n}, expected {layer.m} x {layer.n}",
            )

    def _require_scale(self, module: str, change: float) -> None:
        if not change <= _MOST:
            raise NonFiniteError(
                f"{self.path.name} is wildly off in scale: it changes weights by up to {change:.3g} in"
                f" {module}, where weights are below 1",
                hint="the copy is damaged: download it again, or leave it out",
                file=self.path,
                key=module,
            )

    def _require_finite(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        for role, tensor in tensors.items():
            bad = int((~tensor.isfinite()).sum())
            if bad:
                key = self._modules.keys(module)[role]
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
    dtypes = set()
    for modules in files:
        tensors = modules.header.tensors
        for module in modules.layers:
            for role, key in modules.keys(module).items():
                if role != "alpha":
                    dtypes.add(tensors[key].dtype)
    usable = {torch.float16 if dtype in EIGHT_BIT_FLOATS else dtype for dtype in dtypes}
    return usable.pop() if len(usable) == 1 else torch.float32


def _adapter_settings(header: Header, component: str) -> dict[str, Any]:
    """Returns PEFT's settings of a component, by their names without it."""
    try:
        data = parse_json(header.metadata.get(_ADAPTER, "{}"))
    except ValueError:
        return {}
    if not isinstance(data, dict):
        return {}
    first = f"{component}."
    return {name.removeprefix(first): x for name, x in data.items() if name.startswith(first)}


def _refused(header: Header, fault: str) -> CheckpointError:
    return CheckpointError(
        f"{header.name} {fault}",
        hint="use a LoRA of the same architecture, as its trainer wrote it",
        file=header.path,
    )
