"""Adds LoRAs' companions to a UNet of diffusers, which reads no such files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.detection import require_supported
from hyper_merge.checkpoints.architectures.layout import Layer, layout_of
from hyper_merge.checkpoints.architectures.lora_modules import diffusers_unet_path
from hyper_merge.checkpoints.architectures.signatures import UNET
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.loras.metadata import COMPANION_CONTENT
from hyper_merge.loras.stack import LoraStack
from hyper_merge.runs.folders import metadata_of


def is_companion(path: Path) -> bool:
    """Tells whether a LoRA file is the companion of another one."""
    return COMPANION_CONTENT in metadata_of(path)


class CompanionChanges:
    """The changes that companions make to the UNet of one checkpoint's pipeline."""

    def __init__(self, unet: Any, model: Path) -> None:
        """Takes the UNet, and the checkpoint that it was loaded from."""
        self._unet = unet
        self._header = read_header(model)
        self._layout = layout_of(self._header, require_supported(self._header))
        self._originals: dict[str, Tensor] = {}  # of the changed tensors, by the checkpoint's keys
        self._applied: list[tuple[Path, float]] = []

    @torch.no_grad()
    def apply(self, companions: Sequence[tuple[Path, float]]) -> None:
        """Puts the changes of these files, with their multipliers, in place of all earlier ones."""
        if list(companions) == self._applied:
            return
        for key, original in self._originals.items():
            self._tensor(key).copy_(original)
        self._originals, self._applied = {}, list(companions)
        if companions:
            paths, multipliers = zip(*companions, strict=True)
            with LoraStack(paths, self._header, self._layout) as stack:
                for key, change in self._changes(stack, multipliers):
                    tensor = self._tensor(key)
                    self._originals[key] = tensor.clone()
                    tensor += change.view_as(tensor).to(tensor)

    def _changes(
        self, stack: LoraStack, multipliers: Sequence[float]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields every tensor's key with the sum of its changes."""
        layers = {layer.key: layer for layer in self._layout.layers}
        for key in self._layout.treatments:
            changes = _layer_changes(stack, layers[key]) if key in layers else stack.vectors(key)
            pairs = zip(changes, multipliers, strict=True)
            scaled = [x * change for change, x in pairs if change is not None]
            if scaled:
                yield key, torch.stack(scaled).sum(0)

    def _tensor(self, key: str) -> Tensor:
        stem, _, end = key.removeprefix(UNET).rpartition(".")
        module = self._unet.get_submodule(diffusers_unet_path(stem) or stem)
        # peft puts a module of its own in the place of one that a LoRA changes
        tensor: Tensor = getattr(getattr(module, "base_layer", module), end)
        return tensor


def _layer_changes(stack: LoraStack, layer: Layer) -> list[Tensor | None]:  # each (m, n)
    """Returns what each file adds to a layer at multiplier 1; None for nothing."""
    return [up @ down if up.shape[1] else None for up, down in stack.factors(layer)]
