"""Computes every layer's difference of two checkpoints as low-rank factors, in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hyper_merge.analysis.damaged_tensors import Damage, DamagedTensors
from hyper_merge.analysis.device_bytes import delta_bytes
from hyper_merge.analysis.inputs import MergeInputs, open_checkpoints
from hyper_merge.analysis.streaming_pass import (
    PassOptions,
    analyze_tensor,
    pass_costs,
    raise_non_finite,
)
from hyper_merge.checkpoints.architectures.layout import Treatment, kind_of_tensor
from hyper_merge.decomposition.linalg import energy_of, share
from hyper_merge.decomposition.truncated_svd import truncation_cost
from hyper_merge.loras.lora_file import StoredFormat
from hyper_merge.runtime.devices import try_device
from hyper_merge.runtime.parallel import parallel_map
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.low_rank_layer import LowRankLayer, low_rank_layer


@dataclass(frozen=True, eq=False)
class LowRankDifference:
    """The low-rank differences of all layers that differ, and the energy outside of them by kind."""

    layers: tuple[LowRankLayer, ...]
    outside: Mapping[str, float]

    @property
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors by module, (m, r) and (r, n), as `write_lora` takes them."""
        return {part.layer.module: (part.up, part.down) for part in self.layers}

    @property
    def nbytes(self) -> int:
        """The bytes of all factors."""
        return sum(part.up.nbytes + part.down.nbytes for part in self.layers)

    def energy(self, part: str | None = None) -> float:
        """Returns the squared norm of the differences in the layers, of one part or all."""
        return sum(low.energy for low in self.layers if part in (None, low.layer.part))

    def explained(self, part: str | None = None) -> float:
        """Returns the share of the differences that the factors hold; 1 where nothing differs."""
        energy = self.energy(part)
        errors = sum(low.error for low in self.layers if part in (None, low.layer.part))
        return 1 - share(errors, energy)

    def not_carried(self) -> dict[str, float]:
        """Returns the shares of all differences outside of the layers by kind; 0 if nothing differs."""
        everything = self.energy() + sum(self.outside.values())
        return {kind: energy / (everything or 1.0) for kind, energy in self.outside.items()}


def find_difference(
    inputs: MergeInputs, rank: int, options: PassOptions, progress: Progress
) -> LowRankDifference:
    """Returns the differences after one pass; memory holds few tensors, and the factors.

    Args:
        inputs: a base and one checkpoint.
        rank: of the factors; capped in layers that are smaller.
        options: device and seed.
        progress: progress and interrupt.

    Raises:
        NonFiniteError: a tensor holds NaN or infinity.
        CheckpointError: a file was changed, cannot be read, or is damaged (`DamagedTensors`).
    """
    costs = pass_costs(inputs, PassOptions(options.device))
    for layer in inputs.layout.layers:
        costs[layer.key] += truncation_cost(layer.m, layer.n, rank)
    counter = progress.counter("reading and extracting", costs)
    layers: list[LowRankLayer] = []
    outside: dict[str, float] = {}
    damaged = DamagedTensors(inputs)
    with ExitStack() as stack:
        files = stack.enter_context(open_checkpoints(inputs.read))
        parallel = stack.enter_context(parallel_map(options.device, counter.report))
        stack.enter_context(counter)

        def take(key: str) -> tuple[list[LowRankLayer], float, tuple[Damage, ...]]:
            tensors = [file.tensor(key) for file in files]
            tick, damages = partial(counter.add, key), damaged.find(key, tensors)
            if inputs.layout.treatments[key] is not Treatment.LAYER:
                tensor = analyze_tensor(inputs, key, tensors, PassOptions(options.device), tick)
                return [], float(tensor.energies), damages
            return _take_layers(inputs, key, tensors, rank, options, tick), 0.0, damages

        for key, (factors, energy, damages) in zip(costs, parallel(take, costs), strict=True):
            damaged.add(key, damages)
            layers += factors
            if inputs.layout.treatments[key] is not Treatment.LAYER:
                kind = kind_of_tensor(key, inputs.layout)
                outside[kind] = outside.get(kind, 0.0) + energy
            counter.finish(key)
    damaged.report(progress.warn)
    return LowRankDifference(tuple(layers), outside)


def _take_layers(
    inputs: MergeInputs,
    key: str,
    tensors: Sequence[Tensor],
    rank: int,
    options: PassOptions,
    tick: Callable[[float], None],
) -> list[LowRankLayer]:
    """Returns the layers of one tensor that differ; on the CPU where the device cannot do it."""

    def take(device: torch.device) -> list[LowRankLayer]:
        on = replace(options, device=device)
        return _differing_layers(inputs, key, tensors, rank, on, tick)

    return try_device(options.device, take, delta_bytes(inputs, key))


def _differing_layers(
    inputs: MergeInputs,
    key: str,
    tensors: Sequence[Tensor],
    rank: int,
    options: PassOptions,
    tick: Callable[[float], None],
) -> list[LowRankLayer]:
    layers = []
    for rows, index in inputs.pieces(key):
        base, checkpoint = (tensor[rows].to(options.device).float() for tensor in tensors)
        layer = inputs.layout.layers[index or 0]
        delta = (checkpoint - base).reshape(layer.m, layer.n)
        energy = energy_of(delta)
        if not math.isfinite(energy):
            raise_non_finite(inputs, key, tensors)
        if energy > 0:
            alpha = inputs.layout.family.alpha_for(rank)
            stored = StoredFormat(alpha, inputs.dtype)
            layers.append(low_rank_layer(layer, delta, rank, stored, options.seed, tick))
    return layers
