"""What a merge reads and how it treats it: all that averages and analyses depend on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hyper_merge.checkpoints.header import Header, TensorInfo
from hyper_merge.checkpoints.layers import Layer, Layout, Treatment, output_tensors
from hyper_merge.decomposition.contrasts import Contrasts, around_base, around_mean


@dataclass(frozen=True)
class Sources:
    """The files of one merge with their common layout."""

    headers: tuple[Header, ...]  # of the k checkpoints
    base: Header | None  # of a given base; None for the average
    layout: Layout
    weights: tuple[float, ...]  # of the mean, one per checkpoint
    dtype: torch.dtype  # of the written average
    average_vae: bool = False  # instead of keeping the first checkpoint's

    @property
    def contrasts(self) -> Contrasts:
        """Coordinates of the layers' deviations."""
        return self.contrasts_of(Treatment.LAYER)

    @property
    def read(self) -> tuple[Header, ...]:
        """Every file that is read, the origin of the deviations first."""
        return (self.base, *self.headers) if self.base else self.headers

    def contrasts_of(self, treatment: Treatment) -> Contrasts:
        """Coordinates for tensors of one treatment; keeping the first VAE is a mean of one."""
        if self.base:
            return around_base(len(self.headers))
        if treatment is Treatment.VAE and not self.average_vae:
            return around_mean([1.0] + [0.0] * (len(self.headers) - 1))
        return around_mean(self.weights)

    def outputs(self) -> dict[str, TensorInfo]:
        """Keys, types and shapes of the written average."""
        return output_tensors(self.headers[0], self.layout, self.dtype)

    def pieces(self, key: str) -> list[tuple[slice, int | None]]:
        """Rows in which a tensor is taken apart, with the layer's index: several if it is fused."""
        pieces: list[tuple[slice, int | None]] = [
            (slice(*layer.rows) if layer.rows else slice(None), index)
            for index, layer in enumerate(self.layout.layers)
            if layer.key == key
        ]
        return pieces or [(slice(None), None)]


def bases_width(layer: Layer, width: int) -> tuple[int, int]:
    """Columns (p, q) of a layer's bases when they have `width` at most."""
    return min(layer.m, width), min(layer.n, width)
