"""Measures one checkpoint against the hyper-model: multipliers by normal equations, what is left.

Memory holds few tensors of both files, and of the LoRAs' factors for the same layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from hyper_merge.analysis.damaged_tensors import Damage, DamagedTensors
from hyper_merge.analysis.device_bytes import delta_bytes
from hyper_merge.analysis.inputs import MergeInputs, open_checkpoints
from hyper_merge.analysis.loss_weights import layer_metrics, layer_stretches
from hyper_merge.analysis.sensitivities import Sensitivities
from hyper_merge.analysis.streaming_pass import PassOptions, pass_costs, raise_non_finite
from hyper_merge.checkpoints.architectures.layout import Layer, Treatment, kind_of_tensor
from hyper_merge.checkpoints.architectures.norms_and_biases import Kind
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.decomposition.linalg import block_gram
from hyper_merge.decomposition.ll1 import Statistics, fit_multipliers
from hyper_merge.decomposition.stretch import LayerMetric
from hyper_merge.loras.stack import LoraStack
from hyper_merge.runtime.devices import try_device
from hyper_merge.runtime.parallel import ParallelMap, parallel_map
from hyper_merge.runtime.progress import Progress, ProgressCounter


@dataclass(frozen=True, eq=False)
class Sums:
    """The inner products of one tensor's difference and of what the LoRAs add there."""

    energy: float  # squared norm of the difference
    cross: Tensor  # (R,), float64: <difference, block>
    gram: Tensor  # (R, R), float64: <block, block>

    def left(
        self,
        multipliers: Tensor,  # (R,)
    ) -> float:
        """Returns the squared norm of what is left of the difference, without dense work."""
        explained = multipliers @ (2 * self.cross - self.gram @ multipliers)
        return max(self.energy - float(explained), 0.0)

    def scaled(self, factor: float) -> Sums:
        """Returns the products of tensors that count so many times as much."""
        return Sums(self.energy * factor, self.cross * factor, self.gram * factor)


@dataclass(frozen=True, eq=False)
class LayerSums:
    """The inner products of all layers, in the layout's order, in one metric."""

    sums: tuple[Sums, ...]
    layers: tuple[Layer, ...]

    @property
    def energies(self) -> Tensor:  # (layers,), float64
        """The squared norms of the differences."""
        return torch.tensor([sums.energy for sums in self.sums], dtype=torch.float64)

    def left(self, multipliers: Mapping[str, Tensor]) -> Tensor:  # (layers,), float64
        """Returns the squared norms of what multipliers, by part, leave."""
        pairs = zip(self.sums, self.layers, strict=True)
        values = [sums.left(multipliers[layer.part]) for sums, layer in pairs]
        return torch.tensor(values, dtype=torch.float64)

    def multipliers(
        self, members: Sequence[int], owners: Sequence[int]
    ) -> Tensor:  # (LoRAs,), float64
        """Returns the best multipliers for some of the layers; zeros where nothing differs.

        Args:
            members: the layers.
            owners: for every file the place of the LoRA whose multiplier it has: itself, or for a
                companion its LoRA.
        """
        shared = torch.nn.functional.one_hot(torch.tensor(owners)).double()  # (files, LoRAs)
        cross = torch.zeros(shared.shape[1], dtype=torch.float64)
        gram = torch.zeros(shared.shape[1], shared.shape[1], dtype=torch.float64)
        for index in members:
            sums = self.sums[index]
            cross += sums.cross @ shared
            gram += shared.mT @ sums.gram @ shared
        return fit_multipliers(Statistics(float(self.energies.sum()), cross[None], gram))[0]


@dataclass(frozen=True, eq=False)
class Measurement:
    """The inner products of both files from which multipliers and shares follow."""

    plain: LayerSums
    weighted: LayerSums  # as the loss counts them
    metrics: Sequence[LayerMetric]  # of the layers
    outside: Mapping[str, float]  # kind -> squared norm of the differences outside of the layers
    vectors: Mapping[Kind, tuple[Sums, ...]]  # kind -> of the tensors that companions add to


class MeasuredResidual:
    """What some multipliers leave of a measured difference."""

    measured: Measurement
    multipliers: Mapping[str, Tensor]  # by the layers' part: (R,)

    @property
    def plain_energy(self) -> float:
        """Squared norm of the difference in the layers."""
        return float(self.measured.plain.energies.sum())

    @property
    def plain_error(self) -> float:
        """Squared norm of the rest that the LoRAs leave."""
        return float(self.measured.plain.left(self.multipliers).sum())

    @property
    def energy(self) -> float:
        """Weighted squared norm of the difference in the layers."""
        return float(self.measured.weighted.energies.sum())

    @property
    def error(self) -> float:
        """Weighted squared norm of the rest that the LoRAs leave."""
        return float(self.measured.weighted.left(self.multipliers).sum())


@dataclass(frozen=True, eq=False)
class _Piece:
    """What is measured of a tensor, or of the rows that are one layer."""

    plain: Sums
    stretched: Sums  # in the layer's metric, but for its scale
    size: float  # squared norm of the hyper-model's


def measure(
    inputs: MergeInputs,
    stack: LoraStack,
    options: PassOptions,
    layer_weights: str,
    sensitivities: Sensitivities | None,
    progress: Progress,
) -> Measurement:
    """Returns the inner products after one pass over both files.

    Args:
        inputs: the hyper-model as the base, and one checkpoint.
        stack: the run's LoRAs and companions, open.
        options: device.
        layer_weights: of the run's recipe.
        sensitivities: of the hyper-model, where they are known.
        progress: progress and interrupt.

    Raises:
        NonFiniteError: a tensor holds NaN or infinity.
        CheckpointError: a file was changed, cannot be read, or is damaged (`DamagedTensors`).
    """
    stretches = layer_stretches(inputs.layout.layers, sensitivities)
    layers: dict[int, _Piece] = {}
    outside: dict[str, float] = {}
    vectors: dict[Kind, list[Sums]] = {kind: [] for kind in get_args(Kind)}
    costs = pass_costs(inputs, PassOptions(options.device))
    damaged = DamagedTensors(inputs)
    with open_files(inputs, options, progress.counter("fitting", costs)) as (
        files,
        parallel,
        counter,
    ):

        def take(key: str) -> tuple[list[tuple[int | None, _Piece]], tuple[Damage, ...]]:
            tensors = [file.tensor(key) for file in files]
            damages = damaged.find(key, tensors)
            counter.add(key, costs[key] / 2)

            def measured(device: torch.device) -> list[tuple[int | None, _Piece]]:
                return [
                    (index, _Piece(*_sums(delta, index, key, inputs, stack, stretches), size))
                    for index, delta, size in read_deltas(inputs, key, tensors, device)
                ]

            pieces = try_device(options.device, measured, delta_bytes(inputs, key))
            return pieces, damages

        for key, (pieces, damages) in zip(costs, parallel(take, costs), strict=True):
            damaged.add(key, damages)
            kind = kind_of_tensor(key, inputs.layout)
            for index, piece in pieces:
                if index is not None:
                    layers[index] = piece
                else:
                    outside[kind] = outside.get(kind, 0.0) + piece.plain.energy
                    vector_kind = stack.vector_kind(key)
                    if vector_kind and piece.plain.gram.any():
                        vectors[vector_kind].append(piece.plain)
            counter.finish(key)
    damaged.report(progress.warn)
    ordered = [layers[index] for index in sorted(layers)]
    reached = {kind: tuple(sums) for kind, sums in vectors.items() if sums}
    sizes = torch.tensor([piece.size for piece in ordered], dtype=torch.float64)
    metrics = layer_metrics(layer_weights, sizes, inputs.layout.layers, sensitivities)
    weighted = [
        piece.stretched.scaled(metric.scale) for piece, metric in zip(ordered, metrics, strict=True)
    ]
    return Measurement(
        LayerSums(tuple(piece.plain for piece in ordered), inputs.layout.layers),
        LayerSums(tuple(weighted), inputs.layout.layers),
        metrics,
        outside,
        reached,
    )


@contextmanager
def open_files(
    inputs: MergeInputs, options: PassOptions, counter: ProgressCounter
) -> Iterator[tuple[list[CheckpointReader], ParallelMap, ProgressCounter]]:
    """Opens both files, and a map that reads few tensors at a time."""
    with (
        open_checkpoints(inputs.read) as files,
        parallel_map(options.device, counter.report) as parallel,
        counter,
    ):
        yield files, parallel, counter


def read_deltas(
    inputs: MergeInputs, key: str, tensors: Sequence[Tensor], device: torch.device
) -> Iterator[tuple[int | None, Tensor, float]]:
    """Yields the layer, difference (float32, of a layer a matrix) and base's squared norm by piece.

    Raises:
        NonFiniteError: it holds NaN or infinity.
    """
    is_layer = inputs.layout.treatments[key] is Treatment.LAYER
    for rows, index in inputs.pieces(key):
        base, checkpoint = (tensor[rows].to(device).float() for tensor in tensors)
        delta = checkpoint - base
        if not math.isfinite(_squared(delta)):
            raise_non_finite(inputs, key, tensors)
        if is_layer and index is not None:
            layer = inputs.layout.layers[index]
            yield index, delta.reshape(layer.m, layer.n), _squared(base)
        else:
            yield None, delta, _squared(base)


def _sums(
    delta: Tensor,
    index: int | None,
    key: str,
    inputs: MergeInputs,
    stack: LoraStack,
    stretches: Sequence[LayerMetric],
) -> tuple[Sums, Sums]:
    """Returns the inner products of a tensor or layer, plain and stretched."""
    if index is None:
        vectors = _vector_sums(_squared(delta), delta, stack.vectors(key))
        return vectors, vectors
    metric = stretches[index]
    factors = stack.factors(inputs.layout.layers[index])
    plain = _layer_sums(delta, factors)
    if metric.is_plain:
        return plain, plain
    return plain, _layer_sums(
        metric.apply(delta), [metric.apply_to_factors(*pair) for pair in factors]
    )


def _layer_sums(delta: Tensor, factors: Sequence[tuple[Tensor, Tensor]]) -> Sums:
    cross = [
        ((up.to(delta).mT @ delta) * down.to(delta)).sum(dtype=torch.float64).cpu()
        for up, down in factors
    ]
    ups, downs = zip(*factors, strict=True)
    return Sums(_squared(delta), torch.stack(cross), block_gram(ups, downs))


def _squared(tensor: Tensor) -> float:
    """Returns the squared norm."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64).square())


def _vector_sums(energy: float, delta: Tensor, vectors: Sequence[Tensor | None]) -> Sums:
    flat = delta.flatten().double().cpu()
    rows = [flat.new_zeros(len(flat)) if v is None else v.double().flatten() for v in vectors]
    if all(vector is None for vector in vectors):
        count = len(vectors)
        return Sums(energy, flat.new_zeros(count), flat.new_zeros(count, count))
    matrix = torch.stack(rows)
    return Sums(energy, matrix @ flat, matrix @ matrix.mT)
