"""Analyses one layer's deviations: bases, core."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.decomposition.compression import CompressedLayer, compress, project
from hyper_merge.decomposition.contrasts import TensorDeviations
from hyper_merge.decomposition.linalg import squared_norm

_LARGEST: Final = 2.0**14  # value of a core in float16


@dataclass(frozen=True, eq=False)
class KeptDirections:
    """What a core of many checkpoints holds: slices along directions, scaled into half precision."""

    directions: Tensor  # (d, s), float64: orthonormal columns
    scales: Tensor  # (s,), by which the core was divided


@dataclass(frozen=True, eq=False)
class LayerAnalysis:
    """The result of the pass for one layer."""

    index: int  # among the layout's layers
    gram: Tensor  # (d + 1, d + 1), float64, see `TensorDeviations`
    kept: KeptDirections | None  # None where the core holds all slices as they are
    compressed: CompressedLayer
    rounding: Tensor  # (p, q): the average's rounding error in the layer's bases
    weight: float  # squared norm of the average's own matrix


def analyze_layer(
    deviations: TensorDeviations,
    directions: Tensor | None,  # (d, s), along which its slices lie
    inputs: MergeInputs,
    index: int,
    width: int,
    seed: int,
    tick: Callable[[float], None],
) -> LayerAnalysis:
    """Returns the analysis of a layer.

    Args:
        deviations: of the layer, with the inner products of all slices.
        directions: among the slices, if only mixtures of them are kept.
        inputs: the files.
        index: of the layer.
        width: columns of the bases at most.
        seed: of random numbers.
        tick: called with what every step cost; may raise, to stop.
    """
    layer = inputs.layout.layers[index]
    slices = deviations.slices.view(len(deviations.slices), layer.m, layer.n)
    gram = deviations.gram[:-1, :-1]
    if directions is not None:
        gram = directions.mT @ gram @ directions
    # A stream of random numbers for each layer: the order of the work does not matter.
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(layer.module.encode()))
    compressed = compress(slices, gram, width, generator, tick)
    error = deviations.rounding.view(1, layer.m, layer.n)
    rounding = project(error, compressed.left, compressed.right, tick)[0].cpu()
    return describe_layer(
        index,
        compressed,
        directions,
        gram=deviations.gram,
        rounding=rounding,
        weight=squared_norm(deviations.base),
    )


def describe_layer(
    index: int,
    compressed: CompressedLayer,
    directions: Tensor | None,  # (d, s), along which the slices in its core lie
    *,
    gram: Tensor,
    rounding: Tensor,
    weight: float,
) -> LayerAnalysis:
    """Returns the analysis of a layer that is compressed.

    Args:
        index: of the layer.
        compressed: the layer.
        directions: among the slices, if only mixtures of them are kept.
        gram: as in the result.
        rounding: as in the result.
        weight: as in the result.
    """
    kept = None
    if directions is not None:
        kept, compressed = _in_half_precision(compressed, directions)
    return LayerAnalysis(index, gram, kept, compressed.cpu(), rounding, weight)


def _in_half_precision(
    layer: CompressedLayer, directions: Tensor
) -> tuple[KeptDirections, CompressedLayer]:
    scales = layer.core.abs().amax((1, 2)) / _LARGEST
    scales = torch.where(scales > 0, scales, 1.0)
    core = (layer.core / scales[:, None, None]).half()
    return KeptDirections(directions, scales.cpu()), CompressedLayer(layer.left, layer.right, core)
