"""Reads LoRA files layer by layer into the analysis that the solver takes: QR of factors, no matrices."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

import torch

from hyper_merge.analysis.factored import FactoredAnalysis
from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.decomposition.factored import FactoredLayer, FactorPair, compress_factors
from hyper_merge.loras.input_lora import InputLora
from hyper_merge.operations.loras.inputs import LoraSet
from hyper_merge.runtime.parallel import parallel_map
from hyper_merge.runtime.progress import Progress

_LEAST: Final = 384  # columns: with no more in all, nothing is lost
_PER_RANK: Final = 1.25
_STEP: Final = 32


def basis_width(ranks: Sequence[int]) -> int:
    """Returns the most columns of the bases for LoRAs of these ranks."""
    return max(-(-int(_PER_RANK * sum(ranks)) // _STEP) * _STEP, _LEAST)


def analyze_loras(loras: LoraSet, width: int, progress: Progress) -> FactoredAnalysis:
    """Returns the analysis of all LoRAs' changes.

    Args:
        loras: the files.
        width: columns of the bases at most.
        progress: progress and interrupt.

    Raises:
        CheckpointError: a file was changed, or holds an alpha that is no positive number.
        NonFiniteError: a file holds NaN or infinity.
    """
    costs = {layer.module: float(layer.m + layer.n) for layer in loras.layers}
    counter = progress.counter("reading the LoRAs", costs)
    parts: list[FactoredLayer] = []
    with ExitStack() as stack:
        files = [stack.enter_context(InputLora(modules)) for modules in loras.files]
        parallel = stack.enter_context(parallel_map(torch.device("cpu"), counter.report))
        stack.enter_context(counter)

        def take(layer: Layer) -> FactoredLayer:
            pairs = [_pair(file, layer) for file in files]
            return compress_factors(pairs, (layer.m, layer.n), width)

        for layer, part in zip(loras.layers, parallel(take, loras.layers), strict=True):
            parts.append(part)
            counter.finish(layer.module)
    return FactoredAnalysis(loras.layers, len(files), parts)


def _pair(file: InputLora, layer: Layer) -> FactorPair:
    if layer.module in file.modules:
        return file.factors(layer.module, torch.float32)
    return torch.zeros(layer.m, 0), torch.zeros(0, layer.n)
