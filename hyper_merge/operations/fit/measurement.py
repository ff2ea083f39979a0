"""Measures one checkpoint against the hyper-model: multipliers by normal equations, what is left.

Memory holds few tensors of both files, and of the LoRAs' factors for the same layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from hyper_merge.analysis.blank_tensors import BlankTensors
from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.analysis.streaming_pass import PassOptions, pass_costs, raise_non_finite
from hyper_merge.checkpoints.architectures.layout import Layer, Treatment, kind_of_tensor
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.decomposition.linalg import block_gram
from hyper_merge.decomposition.ll1 import Statistics, fit_multipliers
from hyper_merge.decomposition.truncated_svd import truncation_cost
from hyper_merge.loras.lora_file import StoredFormat
from hyper_merge.loras.stack import LoraStack
from hyper_merge.recipe.parsing import PrivateLoraTarget
from hyper_merge.runtime.parallel import ParallelMap, parallel_map
from hyper_merge.runtime.progress import Progress, ProgressCounter
from hyper_merge.solver.low_rank_layer import LowRankLayer, empty_layer, low_rank_layer

_EIGENVALUES: Final = 10.0  # times the side cubed, and the Gram matrix in addition


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
    vectors: Mapping[str, tuple[Sums, ...]]  # kind -> of the tensors that companions add to

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
        count: int,
        weights: Sequence[float],
    ) -> Tensor:  # (count,), float64
        """Returns the best multipliers for some of the layers; zeros where nothing differs.

        Args:
            members: the layers.
            count: of the files that get one, the first ones.
            weights: of all layers' squared errors.
        """
        cross = torch.zeros(count, dtype=torch.float64)
        gram = torch.zeros(count, count, dtype=torch.float64)
        for index in members:
            sums, weight = self.layers[index], weights[index]
            cross += weight * sums.cross[:count]
            gram += weight * sums.gram[:count, :count]
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
    vectors: dict[str, list[Sums]] = {}
    costs = pass_costs(inputs, PassOptions(options.device))
    blank = BlankTensors(inputs)
    with _reading(inputs, options, progress.counter("fitting", costs)) as (
        files,
        parallel,
        counter,
    ):

        def take(key: str) -> tuple[list[tuple[int | None, Sums]], tuple[int, ...]]:
            tensors = [file.tensor(key) for file in files]
            counter.add(key, costs[key] / 2)
            pieces = [
                (index, replace(_sums(delta, index, key, inputs, stack), size=size))
                for index, delta, size in _deltas(inputs, key, tensors, options.device)
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
                    if sums.gram.any():
                        vectors.setdefault(kind, []).append(sums)
            counter.finish(key)
    blank.report(progress.warn)
    ordered = tuple(layers[index] for index in sorted(layers))
    return Measurement(ordered, outside, {kind: tuple(sums) for kind, sums in vectors.items()})


@dataclass(frozen=True, eq=False)
class StreamedResidual:
    """What the LoRAs with given multipliers leave of a checkpoint, read from the files."""

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
    def energy(self) -> float:
        """Squared norm of the checkpoint's difference in the layers."""
        return self.measured.energy

    @property
    def error(self) -> float:
        """Squared norm of what the LoRAs leave of it."""
        return self.measured.left(self.multipliers, self.layers)

    def spectra(self, _target: PrivateLoraTarget, progress: Progress) -> list[Tensor]:
        """Returns all squared singular values of every layer, float64, falling."""
        costs = {
            layer.module: min(layer.m, layer.n) ** 2 * (max(layer.m, layer.n) + _EIGENVALUES)
            for layer in self.inputs.layout.layers
        }

        def take(layer: Layer, rest: Tensor, tick: Callable[[float], None]) -> Tensor:
            tick(0)
            wide = rest if layer.m <= layer.n else rest.mT
            squares = torch.linalg.eigvalsh((wide @ wide.mT).double())
            return squares.flip(0).clamp(min=0).cpu()

        return self._map(take, "measuring what remains", costs, progress)

    def unreachable(self, _spectra: Sequence[Tensor]) -> float:
        """Returns 0.0: the spectra hold all of the error."""
        return 0.0

    def low_rank(
        self, ranks: Sequence[int], stored: StoredFormat, progress: Progress
    ) -> list[LowRankLayer]:
        """Returns every layer's factors of these ranks as a file will hold them."""
        rank_of = dict(zip(self.inputs.layout.layers, ranks, strict=True))
        costs = {
            layer.module: truncation_cost(layer.m, layer.n, max(rank, 1))
            for layer, rank in rank_of.items()
        }

        def take(layer: Layer, rest: Tensor, tick: Callable[[float], None]) -> LowRankLayer:
            rank = rank_of[layer]
            if not rank or not rest.any():
                return empty_layer(layer, stored.dtype)
            return low_rank_layer(layer, rest, rank, stored, self.options.seed, tick)

        return self._map(take, "making the top-up", costs, progress)

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
        with _reading(self.inputs, self.options, counter) as (files, parallel, _):

            def take(key: str) -> list[tuple[int, Any]]:
                tensors = [file.tensor(key) for file in files]
                results = []
                for index, delta, _ in _deltas(self.inputs, key, tensors, self.options.device):
                    layer = layers[index or 0]
                    tick = partial(counter.add, layer.module)
                    results.append((index or 0, function(layer, self._rest(layer, delta), tick)))
                return results

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


@contextmanager
def _reading(
    inputs: MergeInputs, options: PassOptions, counter: ProgressCounter
) -> Iterator[tuple[list[CheckpointReader], ParallelMap, ProgressCounter]]:
    """Opens both files, and a map that reads few tensors at a time."""
    base, header = inputs.read
    with (
        CheckpointReader(base.path, expected=base) as first,
        CheckpointReader(header.path, expected=header) as second,
        parallel_map(options.device, counter.report) as parallel,
        counter,
    ):
        yield [first, second], parallel, counter


def _deltas(
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
