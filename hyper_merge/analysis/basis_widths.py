"""Chooses the width of each layer's bases, and what is kept of many checkpoints, from a sample of all files.

Layers with more energy for the bytes of a rank need more ranks, and so wider bases. The cost of the
whole pass stays what it would be with one width for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from hyper_merge.analysis.inputs import MergeInputs, open_checkpoints
from hyper_merge.analysis.loss_weights import layer_factors
from hyper_merge.analysis.streaming_pass import PassOptions
from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.decomposition.contrasts import KEPT, compute_deviations
from hyper_merge.runtime.progress import Progress

_PLACES: Final = 4  # of samples in a tensor
_SAMPLE: Final = 2**13  # entries at each
_LEAST: Final = 96  # columns, for lists of ranks that come later
_STEP: Final = 32  # columns by which widths differ: fewer shapes, fuller batches
_COMMON: Final = KEPT // 2  # directions among checkpoints that all layers keep
_POWER: Final = 0.7  # ranks grow with energy per byte to the power of 1 / (2 alpha), alpha 0.5 to 1
_HALVINGS: Final = 40  # of the search for the common factor


def sampled_options(inputs: MergeInputs, options: PassOptions, progress: Progress) -> PassOptions:
    """Returns options with the most columns of each layer's bases, in the mean the nominal width.

    Of more checkpoints than each layer keeps directions of, they also have those that are common.

    Args:
        inputs: the files, of which a small part is read.
        options: of the pass, with the width of all layers if they had the same.
        progress: checked between layers.

    Raises:
        CheckpointError: a file was changed or cannot be read.
    """
    return options_by(sample_layers(inputs, progress), inputs, options)


def options_by(samples: LayerSamples, inputs: MergeInputs, options: PassOptions) -> PassOptions:
    """Returns what `sampled_options` does, from samples that were taken before."""
    layers = inputs.layout.layers
    # Where ranks will go by default. The bases serve the other weightings too, a little less well.
    factors = layer_factors("output", samples.sizes, layers)
    widths = allocate_widths(layers, (samples.energies * factors).tolist(), options.width or 0)
    if inputs.contrasts.are_few:
        return replace(options, widths=widths)
    _, vectors = torch.linalg.eigh((samples.grams * factors[:, None, None]).sum(0))
    return replace(options, widths=widths, directions=vectors[:, -_COMMON:].flip(1))


@dataclass(frozen=True, eq=False)
class LayerSamples:
    """Squared norms of all layers, estimated from samples of their tensors."""

    grams: Tensor  # (layers, d, d), float64: inner products of the deviations' slices
    sizes: Tensor  # (layers,), float64: of the weights in the first file

    @property
    def energies(self) -> Tensor:  # (layers,), float64
        """Those of the deviations."""
        return self.grams.diagonal(dim1=1, dim2=2).sum(1)


def sample_layers(inputs: MergeInputs, progress: Progress, *, sparse: bool = False) -> LayerSamples:
    """Estimates the squared norms of every layer's deviations and weights.

    Args:
        inputs: the files, of which a small part is read.
        progress: checked between layers.
        sparse: whether nothing else will be read of the files, and so nothing ahead.

    Raises:
        CheckpointError: a file was changed or cannot be read.
    """
    grams, sizes = [], []
    with open_checkpoints(inputs.read, sparse=sparse) as files:
        for layer in inputs.layout.layers:
            progress.check()
            rows = slice(*layer.rows) if layer.rows else slice(None)
            origin, *others = [sample(file.tensor(layer.key)[rows].flatten()) for file in files]
            contrasts = inputs.contrasts_of(layer.key)
            deviations = compute_deviations(
                origin, others, contrasts, torch.float32, origin.numel()
            )
            whole = layer.m * layer.n / origin.numel()
            grams.append(deviations.gram[:-1, :-1] * whole)
            sizes.append(float(origin.double().square().sum()) * whole)
    return LayerSamples(torch.stack(grams), torch.tensor(sizes, dtype=torch.float64))


def allocate_widths(
    layers: Sequence[Layer], energies: Sequence[float], nominal: int
) -> tuple[int, ...]:
    """Returns widths that follow the energy per byte and cost as much as the nominal width."""
    sizes = torch.tensor([layer.m * layer.n for layer in layers], dtype=torch.float64)
    limits = torch.tensor([max(layer.m, layer.n) for layer in layers], dtype=torch.float64)
    sides = torch.tensor([layer.m + layer.n for layer in layers], dtype=torch.float64)
    needs = (torch.tensor(energies, dtype=torch.float64) / sides) ** _POWER
    if not bool(needs.isfinite().all()) or float(needs.sum()) <= 0:
        return tuple(int(limit.clamp(max=nominal)) for limit in limits)
    budget = float((sizes * limits.clamp(max=nominal)).sum())
    low = _LEAST / float(needs.max())  # of the common factor: narrower bases are not made
    high = max(float(limits.max() / needs[needs > 0].min()), low)
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5  # energies differ by many orders of magnitude
        affordable = float((sizes * _clamped(middle * needs, limits)).sum()) <= budget
        low, high = (middle, high) if affordable else (low, middle)
    return tuple(int(width) for width in _clamped(low * needs, limits))


def _clamped(widths: Tensor, limits: Tensor) -> Tensor:  # all (layers,)
    stepped = (widths / _STEP).round() * _STEP
    return torch.minimum(stepped.clamp(min=_LEAST), limits)


def sample(values: Tensor) -> Tensor:  # (size,) -> (<= size,)
    """Returns the values of `sample_segments`."""
    segments = sample_segments(values.numel())
    return values if len(segments) == 1 else torch.cat([values[part] for part in segments])


def sample_segments(size: int) -> list[slice]:
    """Returns the parts of a flat tensor of that size that stand for all of it."""
    if size <= _PLACES * _SAMPLE:
        return [slice(0, size)]
    starts = torch.linspace(0, size - _SAMPLE, _PLACES).long().tolist()
    return [slice(start, start + _SAMPLE) for start in starts]
