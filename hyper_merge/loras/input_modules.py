"""The modules of a LoRA file of any trainer, by one family's names: read from its header alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.errors import CheckpointError
from hyper_merge.loras.adapters import MatrixShape, matrix_shape
from hyper_merge.loras.input_keys import SpelledModule
from hyper_merge.loras.module_names import ModuleIndex, Place
from hyper_merge.runtime.checked_json import parse_json

_ADAPTER: Final = "lora_adapter_metadata"  # of diffusers: the settings of PEFT
_LARGEST: Final = 1e6  # alpha, far beyond all that trainers take
_EXPECTED: Final = f"expected a number above 0, {_LARGEST:,.0f} at most"
_COMPONENTS: Final = ("text_encoder_2", "text_encoder", "unet", "transformer")


@dataclass(frozen=True)
class LoraPart:
    """A module of a file, and rows of a layer that it changes; all of them, for most."""

    spelled: SpelledModule
    shape: MatrixShape
    place: Place

    @property
    def factor_keys(self) -> tuple[str, ...]:
        """The keys of all its tensors but alpha."""
        return tuple(key for role, key in self.spelled.keys.items() if role != "alpha")


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
        self._parts: dict[str, list[LoraPart]] = {}
        for spelled in modules:
            self._add(spelled, index.find(spelled.name))

    @property
    def parts(self) -> tuple[LoraPart, ...]:
        """The parts of all layers."""
        return tuple(part for parts in self._parts.values() for part in parts)

    def parts_of(self, module: str) -> tuple[LoraPart, ...]:
        """Returns the modules of the file that are a layer together, by the layer's name in the family."""
        return tuple(self._parts[module])

    def scale(self, part: LoraPart, alpha: Tensor | None) -> float:
        """Returns what the product of a module's tensors is multiplied by.

        Without an alpha it is 1 in all programs, unless the file says the settings of PEFT.

        Raises:
            CheckpointError: the alpha is no number above 0.
        """
        divisor = part.shape.divisor
        if divisor is None:
            return 1.0
        if alpha is None:
            return self._peft_scale(part.spelled.name, divisor)
        value = float(alpha) if alpha.numel() == 1 else math.nan
        if not 0 < value <= _LARGEST:
            raise CheckpointError(
                f"{self.header.name} has the alpha {value} in {part.spelled.name}, {_EXPECTED}",
                hint="use another",
                file=self.header.path,
                key=part.spelled.keys["alpha"],
            )
        return value / divisor

    def _add(self, spelled: SpelledModule, places: Sequence[Place]) -> None:
        if not places:
            raise refused(
                self.header, f"has the module {spelled.name}, unknown to this family", spelled.name
            )
        tensors = self.header.tensors
        for key in spelled.keys.values():
            is_number = key in tensors and (
                tensors[key].dtype.is_floating_point or key.endswith(".alpha")
            )
            if not is_number:
                raise refused(self.header, f"stores {key} in a type that is no float", spelled.name)
        shapes = {role: tensors[key].shape for role, key in spelled.keys.items()}
        shape = matrix_shape(shapes)
        if shape is None:
            listed = ", ".join(f"{role} {tuple(size)}" for role, size in shapes.items())
            raise refused(
                self.header,
                f"has tensors in {spelled.name} that do not fit together or lack a half: {listed}",
                spelled.name,
            )
        m, n = places[0].shape
        if (shape.m, shape.n) != (m, n):
            raise refused(
                self.header,
                f"has {spelled.name} of {shape.m} x {shape.n}, expected {m} x {n}",
                spelled.name,
            )
        for place in places:
            self._add_part(LoraPart(spelled, shape, place))

    def _add_part(self, part: LoraPart) -> None:
        layer, (first, end) = part.place.layer, part.place.rows
        parts = self._parts.setdefault(layer.module, [])
        for other in parts:
            if first < other.place.rows[1] and other.place.rows[0] < end:
                raise refused(
                    self.header,
                    f"holds one module twice, as {other.spelled.name} and {part.spelled.name}",
                    part.spelled.name,
                )
        parts.append(part)
        # Whole tensors and companions are a matter of what we write, not of what we read.
        self.layers[layer.module] = replace(layer, is_end=False, whole=False)
        rank = self.ranks.get(layer.module, 0) + min(part.shape.rank, end - first)
        self.ranks[layer.module] = min(rank, layer.m, layer.n)

    def _peft_scale(self, spelled: str, rank: int) -> float:
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
            raise refused(
                self.header,
                f"says the alpha {str(alpha)[:20]} of {spelled} in its metadata, {_EXPECTED}",
            )
        return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


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


def refused(header: Header, fault: str, key: str | None = None) -> CheckpointError:
    """Returns the refusal of a file that says the fault, and the key where there is one."""
    return CheckpointError(
        f"{header.name} {fault}",
        hint="use a LoRA of the same architecture, as its trainer wrote it",
        file=header.path,
        key=key,
    )
