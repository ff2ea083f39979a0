"""Gives what a run's shared LoRAs leave of a fitted LoRA, layer by layer from factors alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.loras.lora_file import StoredFormat
from hyper_merge.loras.weighted_sum import OpenLora, WeightedSum
from hyper_merge.operations.fit.measurement import MeasuredResidual, Measurement
from hyper_merge.runtime.parallel import map_with_progress
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.low_rank_layer import LowRankLayer, empty_layer

_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class FactoredResidual(MeasuredResidual):
    """A LoRA less the shared ones times their multipliers: the rest that a private LoRA holds."""

    layers: Sequence[Layer]
    target: OpenLora
    shared: Sequence[OpenLora]
    multipliers: Mapping[str, Tensor]  # by the layers' part: (R,)
    measured: Measurement
    checkpoint: int = 0  # the only one
    margin: float = 0.995  # rounding takes a little

    @property
    def dtype(self) -> torch.dtype:
        """The type of the shared LoRAs' factors; float32 if they differ."""
        dtypes = {lora.dtype for lora in self.shared}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def spectra(self, _most: int, progress: Progress) -> list[Tensor]:
        """Returns all squared singular values of every layer, falling, float64, weighted."""

        def take(layer: Layer) -> Tensor:
            if layer.module not in self._ranks:
                return torch.zeros(0, dtype=torch.float64)
            return self._rest.spectrum(layer) * self._scales[layer.module]

        return self._map("measuring what remains", take, progress)

    def largest(self, spectra: Sequence[Tensor]) -> list[float]:
        """Returns the largest singular value of the rest in every layer."""
        pairs = zip(spectra, self.layers, strict=True)
        return [
            float(values[:1].sum() / self._scales[layer.module]) ** 0.5 for values, layer in pairs
        ]

    def unreachable(self, _spectra: Sequence[Tensor]) -> float:
        """Returns 0: the spectra hold all that remains."""
        return 0.0

    def low_rank(
        self, ranks: Sequence[int], stored: StoredFormat, progress: Progress
    ) -> list[LowRankLayer]:
        """Returns every layer's factors of these ranks as a file will hold them."""
        rank_of = dict(zip(self.layers, ranks, strict=True))

        def take(layer: Layer) -> LowRankLayer:
            if not rank_of[layer]:
                return empty_layer(layer, stored.dtype)
            part = self._rest.stored(layer, stored.alpha, stored.dtype, rank_of[layer])
            scale, squares = self._scales[layer.module], (part.energy, part.lost)
            return LowRankLayer(layer, *part.factors, *squares, *(scale * x for x in squares))

        return self._map("making the top-up", take, progress)

    @cached_property
    def _rest(self) -> WeightedSum:
        return WeightedSum(
            (self.target, *self.shared),
            lambda layer: (1.0, *(-x for x in self.multipliers[layer.part].tolist())),
        )

    @cached_property
    def _ranks(self) -> Mapping[str, int]:
        """The most rank of each module that any of the files has."""
        return {name: rank for name, (_, rank) in self._rest.ranks().items()}

    @cached_property
    def _scales(self) -> Mapping[str, float]:
        """How often a squared error counts, by module: without a checkpoint alike in all directions."""
        pairs = zip(self.layers, self.measured.metrics, strict=True)
        return {layer.module: metric.scale for layer, metric in pairs}

    def _map(
        self, phase: str, function: Callable[[Layer], _Result], progress: Progress
    ) -> list[_Result]:
        """Returns a function's results for all layers, in their order."""
        costs = {
            layer: 1.0 + (layer.m + layer.n) * self._ranks.get(layer.module, 0) ** 2
            for layer in self.layers
        }
        return map_with_progress(function, costs, phase, progress)
