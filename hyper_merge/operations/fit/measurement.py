"""Measures one checkpoint against the hyper-model: multipliers by normal equations, what is left.

Memory holds few tensors of both files, and of the LoRAs' factors for the same layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from hyper_merge.analysis.blank_tensors import BlankTensors
from hyper_merge.analysis.inputs import MergeInputs, open_checkpoints
from hyper_merge.analysis.streaming_pass import PassOptions, pass_costs, raise_non_finite
from hyper_merge.checkpoints.architectures.layout import Layer, Treatment, kind_of_tensor
from hyper_merge.checkpoints.architectures.norms_and_biases import Kind
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.decomposition.linalg import block_gram
from hyper_merge.decomposition.ll1 import Statistics, fit_multipliers
from hyper_merge.loras.stack import LoraStack
from hyper_merge.runtime.parallel import ParallelMap, parallel_map
from hyper_merge.runtime.progress import Progress, ProgressCounter


@dataclass(frozen=True, eq=False)
class Sums:
    """The inner products of one tensor's difference and of what the LoRAs add there."""

    energy: float  # squared norm of the difference
    cross: Tensor  # (R,), float64: <difference, block>
    gram: Tensor  # (R, R), float64: <block, block>
    size: float = 1.0  # squared norm of the hyper-model's matrix

    def left(
        self,
        multipliers: Tensor,  # (R,)
    ) -> float:
        """Returns the squared norm of what is left of the difference, without dense work."""
        explained = multipliers @ (2 * self.cross - self.gram @ multipliers)
        return max(self.energy - float(explained), 0.0)


@dataclass(frozen=True, eq=False)
class Measurement:
    """The inner products of both files from which multipliers and shares follow."""

    layers: tuple[Sums, ...]  # in the layout's order
    outside: Mapping[str, float]  # kind -> squared norm of the differences outside of the layers
    vectors: Mapping[Kind, tuple[Sums, ...]]  # kind -> of the tensors that companions add to

    @property
    def energy(self) -> float:
        """The squared norm of the differences in the layers."""
        return sum(sums.energy for sums in self.layers)

    def lefts(self, multipliers: Mapping[str, Tensor], layers: Sequence[Layer]) -> list[float]:
        """Returns for every layer the squared norm of what multipliers, by part, leave."""
        pairs = zip(self.layers, layers, strict=True)
        return [sums.left(multipliers[layer.part]) for sums, layer in pairs]

    def left(self, multipliers: Mapping[str, Tensor], layers: Sequence[Layer]) -> float:
        """Returns the squared norm of what multipliers, by part, leave in all layers."""
        return sum(self.lefts(multipliers, layers))

    def multipliers(
        self,
        members: Sequence[int],
        owners: Sequence[int],
        weights: Sequence[float],
    ) -> Tensor:  # (LoRAs,), float64
        """Returns the best multipliers for some of the layers; zeros where nothing differs.

        Args:
            members: the layers.
            owners: for every file the place of the LoRA whose multiplier it has: itself, or for a
                companion its LoRA.
            weights: of all layers' squared errors.
        """
        shared = torch.nn.functional.one_hot(torch.tensor(owners)).double()  # (files, LoRAs)
        cross = torch.zeros(shared.shape[1], dtype=torch.float64)
        gram = torch.zeros(shared.shape[1], shared.shape[1], dtype=torch.float64)
        for index in members:
            sums, weight = self.layers[index], weights[index]
            cross += weight * (sums.cross @ shared)
            gram += weight * (shared.mT @ sums.gram @ shared)
        return fit_multipliers(Statistics(self.energy, cross[None], gram))[0]


def measure(
    inputs: MergeInputs, stack: LoraStack, options: PassOptions, progress: Progress
) -> Measurement:
    """Returns the inner products after one pass over both files.

    Args:
        inputs: the hyper-model as the base, and one checkpoint.
        stack: the run's LoRAs and companions, open.
        options: device.
        progress: progress and interrupt.

    Raises:
        NonFiniteError: a tensor holds NaN or infinity.
        CheckpointError: a file was changed, cannot be read, or lacks data (`BlankTensors`).
    """
    layers: dict[int, Sums] = {}
    outside: dict[str, float] = {}
    vectors: dict[Kind, list[Sums]] = {kind: [] for kind in get_args(Kind)}
    costs = pass_costs(inputs, PassOptions(options.device))
    blank = BlankTensors(inputs)
    with open_files(inputs, options, progress.counter("fitting", costs)) as (
        files,
        parallel,
        counter,
    ):

        def take(key: str) -> tuple[list[tuple[int | None, Sums]], tuple[int, ...]]:
            tensors = [file.tensor(key) for file in files]
            counter.add(key, costs[key] / 2)
            pieces = [
                (index, replace(_sums(delta, index, key, inputs, stack), size=size))
                for index, delta, size in read_deltas(inputs, key, tensors, options.device)
            ]
            return pieces, blank.find(key, tensors)

        for key, (pieces, places) in zip(costs, parallel(take, costs), strict=True):
            blank.add(key, places)
            kind = kind_of_tensor(key, inputs.layout)
            for index, sums in pieces:
                if index is not None:
                    layers[index] = sums
                else:
                    outside[kind] = outside.get(kind, 0.0) + sums.energy
                    vector_kind = stack.vector_kind(key)
                    if vector_kind and sums.gram.any():
                        vectors[vector_kind].append(sums)
            counter.finish(key)
    blank.report(progress.warn)
    ordered = tuple(layers[index] for index in sorted(layers))
    reached = {kind: tuple(sums) for kind, sums in vectors.items() if sums}
    return Measurement(ordered, outside, reached)


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
    delta: Tensor, index: int | None, key: str, inputs: MergeInputs, stack: LoraStack
) -> Sums:
    energy = _squared(delta)
    if index is None:
        return _vector_sums(energy, delta, stack.vectors(key))
    factors = stack.factors(inputs.layout.layers[index])
    cross = [
        ((up.to(delta).mT @ delta) * down.to(delta)).sum(dtype=torch.float64).cpu()
        for up, down in factors
    ]
    ups, downs = zip(*factors, strict=True)
    return Sums(energy, torch.stack(cross), block_gram(ups, downs))


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
