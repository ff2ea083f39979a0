"""Measures and compresses what a run's LoRAs leave of a fitted checkpoint, read from the files.

Memory holds few tensors of both files, and of the LoRAs' factors for the same layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from hyper_merge.analysis.device_bytes import delta_bytes
from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.analysis.streaming_pass import PassOptions
from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.decomposition.linalg import eigenvalues
from hyper_merge.decomposition.stretch import LayerMetric
from hyper_merge.decomposition.truncated_svd import truncation_cost
from hyper_merge.loras.lora_file import StoredFormat
from hyper_merge.loras.stack import LoraStack
from hyper_merge.operations.fit.measurement import (
    MeasuredResidual,
    Measurement,
    open_files,
    read_deltas,
)
from hyper_merge.runtime.devices import try_device
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.low_rank_layer import LowRankLayer, empty_layer, low_rank_layer

_EIGENVALUES: Final = 10.0  # times the side cubed, and the Gram matrix in addition


@dataclass(frozen=True, eq=False)
class StreamedResidual(MeasuredResidual):
    """The rest of a checkpoint that LoRAs with given multipliers leave, read from the files."""

    inputs: MergeInputs  # the hyper-model as the base, and the checkpoint
    added: LoraStack
    multipliers: Mapping[str, Tensor]  # by the layers' part: (R,)
    options: PassOptions
    measured: Measurement
    checkpoint: int = 0  # the only one
    margin: float = 0.995  # rounding and the truncated SVD take a little

    @property
    def layers(self) -> Sequence[Layer]:
        """All layers."""
        return self.inputs.layout.layers

    @property
    def dtype(self) -> torch.dtype:
        """The type of the LoRAs' factors."""
        return self.added.dtype

    def spectra(self, _most: int, progress: Progress) -> list[Tensor]:
        """Returns all squared singular values of every layer that LoRAs reach, float64, falling."""
        costs = {
            layer.module: min(layer.m, layer.n) ** 2 * (max(layer.m, layer.n) + _EIGENVALUES)
            for layer in self.inputs.layout.layers
        }
        metric_of = self._metrics

        def take(layer: Layer, rest: Tensor, tick: Callable[[float], None]) -> Tensor:
            tick(0)
            if layer.is_end:  # private LoRAs have no companions
                return torch.zeros(0, dtype=torch.float64)
            weighted = metric_of[layer].apply(rest)
            wide = weighted if layer.m <= layer.n else weighted.mT
            return eigenvalues((wide @ wide.mT).double()).flip(0).clamp(min=0)

        return self._map(take, "measuring what remains", costs, progress)

    def unreachable(self, _spectra: Sequence[Tensor]) -> float:
        """Returns the weighted error of the end layers: the spectra hold all of the other error."""
        errors = self.measured.weighted.left(self.multipliers)
        ends = [layer.is_end for layer in self.layers]
        return float(errors[ends].sum())

    def largest(self, spectra: Sequence[Tensor]) -> list[float]:
        """Returns the largest singular value of the rest in every layer, or more.

        Stretches only lengthen, so the plain value is at most that of the metric without its scale.
        """
        pairs = zip(spectra, self.measured.metrics, strict=True)
        return [float(values[:1].sum() / metric.scale) ** 0.5 for values, metric in pairs]

    def low_rank(
        self, ranks: Sequence[int], stored: StoredFormat, progress: Progress
    ) -> list[LowRankLayer]:
        """Returns every layer's factors of these ranks as a file will hold them."""
        rank_of = dict(zip(self.inputs.layout.layers, ranks, strict=True))
        metric_of = self._metrics
        costs = {
            layer.module: truncation_cost(layer.m, layer.n, max(rank, 1))
            for layer, rank in rank_of.items()
        }

        def take(layer: Layer, rest: Tensor, tick: Callable[[float], None]) -> LowRankLayer:
            rank = rank_of[layer]
            if not rank or not rest.any():
                return empty_layer(layer, stored.dtype)
            seed, metric = self.options.seed, metric_of[layer]
            return low_rank_layer(layer, rest, rank, stored, seed, tick, metric)

        return self._map(take, "making the top-up", costs, progress)

    @property
    def _metrics(self) -> dict[Layer, LayerMetric]:
        return dict(zip(self.layers, self.measured.metrics, strict=True))

    def _map(
        self,
        function: Callable[[Layer, Tensor, Callable[[float], None]], Any],
        phase: str,
        costs: Mapping[str, float],
        progress: Progress,
    ) -> list[Any]:
        """Returns a function's results for the rest of every layer, in their order."""
        layers = self.inputs.layout.layers
        keys = list(dict.fromkeys(layer.key for layer in layers))
        by_layer: dict[int, Any] = {}
        counter = progress.counter(phase, costs)
        with open_files(self.inputs, self.options, counter) as (files, parallel, _):

            def take(key: str) -> list[tuple[int, Any]]:
                tensors = [file.tensor(key) for file in files]

                def on(device: torch.device) -> list[tuple[int, Any]]:
                    results = []
                    for index, delta, _ in read_deltas(self.inputs, key, tensors, device):
                        layer = layers[index or 0]
                        tick = partial(counter.add, layer.module)
                        result = function(layer, self._rest(layer, delta), tick)
                        results.append((index or 0, result))
                    return results

                return try_device(self.options.device, on, delta_bytes(self.inputs, key))

            for results in parallel(take, keys):
                for index, result in results:
                    by_layer[index] = result
                    counter.finish(layers[index].module)
        return [by_layer[index] for index in range(len(layers))]

    def _rest(
        self,
        layer: Layer,
        delta: Tensor,  # (m, n)
    ) -> Tensor:  # (m, n)
        pairs = zip(self.added.factors(layer), self.multipliers[layer.part].tolist(), strict=True)
        ups, downs = zip(
            *(((up * x).to(delta), down.to(delta)) for (up, down), x in pairs), strict=True
        )
        return torch.addmm(delta, torch.cat(ups, 1), torch.cat(downs), alpha=-1)
