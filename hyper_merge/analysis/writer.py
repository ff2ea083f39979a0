"""Writes an analysis layer by layer, into the open file that the store gives."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hyper_merge.analysis.checksums import CHECKSUMS, checksum
from hyper_merge.analysis.file_layout import UNCARRIED_KINDS
from hyper_merge.analysis.layer_analysis import LayerAnalysis
from hyper_merge.checkpoints.io.header import TensorInfo
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter


class AnalysisWriter:
    """Writes an analysis layer by layer during the pass."""

    def __init__(self, writer: SafetensorsWriter, tensors: Mapping[str, TensorInfo]) -> None:
        """Takes the open writer of `create_analysis`, and the tensors that it was declared with."""
        self._tensors = tensors
        self._checksums: dict[str, int] = {}
        self._grams: dict[int, Tensor] = {}
        self._weights: dict[int, float] = {}
        self._writer = writer

    def keep(self, layer: LayerAnalysis) -> None:
        """Writes the analysis of one layer."""
        self._grams[layer.index] = layer.gram
        self._weights[layer.index] = layer.weight
        for key, tensor in layer_tensors(layer).items():
            self._write(key, tensor)

    def close_with(self, not_carried: Mapping[str, Tensor]) -> None:
        """Writes what is known only after the last tensor.

        Args:
            not_carried: energies (k,) outside of all layers, by kind.
        """
        indices = sorted(self._grams)
        grams = torch.stack([self._grams[index] for index in indices])
        weights = torch.tensor([self._weights[index] for index in indices], dtype=torch.float64)
        self._write("weights", weights)
        zeros = grams.new_zeros(next(iter(not_carried.values())).shape)
        self._write("grams", grams)
        self._write(
            "not_carried", torch.stack([not_carried.get(kind, zeros) for kind in UNCARRIED_KINDS])
        )
        checksums = [self._checksums[key] for key in sorted(self._checksums)]
        self._writer.write(CHECKSUMS, torch.tensor(checksums, dtype=torch.int64))

    def _write(self, key: str, tensor: Tensor) -> None:
        stored = tensor.detach().to("cpu", self._tensors[key].dtype)
        self._checksums[key] = checksum(stored)
        self._writer.write(key, stored)


def layer_tensors(layer: LayerAnalysis) -> dict[str, Tensor]:
    """Returns the tensors of a layer's analysis by their keys in the file."""
    compressed = layer.compressed
    parts = {
        "core": compressed.core,
        "left": compressed.left,
        "right": compressed.right,
        "rounding": layer.rounding,
    }
    if layer.kept:
        parts |= {"directions": layer.kept.directions, "scales": layer.kept.scales}
    return {f"{layer.index}.{name}": tensor for name, tensor in parts.items()}
