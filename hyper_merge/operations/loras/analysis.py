"""Reads LoRA files layer by layer into the analysis that the solver takes: QR of factors, no matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from hyper_merge.analysis.factored import FactoredAnalysis
from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.io.dtypes import DTYPES_BY_WORD
from hyper_merge.decomposition.factored import (
    FEW,
    FactoredLayer,
    FactorPair,
    compress_factors,
    compress_many,
    singular_components,
)
from hyper_merge.decomposition.rank_allocation import last_rate
from hyper_merge.loras.input_lora import InputLora
from hyper_merge.operations.loras.inputs import LoraSet
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.parallel import parallel_map
from hyper_merge.runtime.progress import Progress
from hyper_merge.runtime.scratch import Scratch

_LEAST: Final = 384  # columns: with no more in all, nothing is lost
_PER_RANK: Final = 1.25
_STEP: Final = 32
_SAMPLE: Final = 16  # layers, from which many LoRAs' price of a byte is told

_Widths = Callable[[Layer, Tensor], int]
"""Returns a layer's columns of the bases at most, from the energies of all LoRAs' components."""


@contextmanager
def analyze_loras(
    loras: LoraSet, recipe: Recipe, cache: Path, progress: Progress, *, many: bool | None = None
) -> Iterator[FactoredAnalysis]:
    """Gives the analysis of all LoRAs' changes.

    Args:
        loras: the files.
        recipe: says how many bytes the shared LoRAs take.
        cache: folder of the file, without a name, that holds what of many LoRAs is too much for memory.
        progress: progress and interrupt.
        many: whether the solver takes the way for many inputs; None where their number decides.

    Raises:
        CheckpointError: a file was changed, or holds an alpha that is no positive number.
        NonFiniteError: a file holds NaN or infinity.
    """
    costs = {layer.module: float(layer.m + layer.n) for layer in loras.layers}
    counter = progress.counter("reading the LoRAs", costs)
    parts: list[FactoredLayer] = []
    with ExitStack() as stack:
        files = [stack.enter_context(InputLora(modules)) for modules in loras.files]
        width = basis_width(recipe.ranks)
        many = len(files) > FEW if many is None else many
        widths = widths_of_many(loras, files, recipe, width) if many else None
        scratch = _scratch(cache) if widths else Scratch()
        parallel = stack.enter_context(parallel_map(torch.device("cpu"), counter.report))
        stack.enter_context(counter)

        def take(layer: Layer) -> FactoredLayer:
            pairs = [factor_pair(file, layer) for file in files]
            if widths is None:
                return compress_factors(pairs, (layer.m, layer.n), width)
            part = compress_many(pairs, (layer.m, layer.n), partial(widths, layer))
            left, right, ups, downs = scratch.keep([part.left, part.right, part.ups, part.downs])
            return replace(part, left=left, right=right, ups=ups, downs=downs)

        for layer, part in zip(loras.layers, parallel(take, loras.layers), strict=True):
            parts.append(part)
            counter.finish(layer.module)
    try:
        yield FactoredAnalysis(loras.layers, len(files), parts, scratch)
    finally:
        scratch.close()


def _scratch(cache: Path) -> Scratch:
    cache.mkdir(parents=True, exist_ok=True)
    return Scratch(cache)


def basis_width(ranks: Sequence[int]) -> int:
    """Returns the most columns of the bases for LoRAs of these ranks."""
    return max(-(-int(_PER_RANK * sum(ranks)) // _STEP) * _STEP, _LEAST)


def widths_of_many(
    loras: LoraSet, files: Sequence[InputLora], recipe: Recipe, width: int
) -> _Widths:
    """Returns what gives every layer the columns that its components are worth within a budget."""
    most = sum(max(modules.ranks.values(), default=0) for modules in loras.files)
    if recipe.target is not None or most <= _LEAST:
        return lambda _layer, _energies: width
    by_size = sorted(loras.layers, key=lambda layer: layer.m + layer.n)
    sample = by_size[:: -(-len(by_size) // _SAMPLE)]
    times = sum(layer.m + layer.n for layer in by_size) / sum(x.m + x.n for x in sample)
    rates, costs = [], []
    for layer in sample:
        pairs = [factor_pair(file, layer) for file in files]
        energies = singular_components(pairs, (layer.m, layer.n)).energies
        rates.append(energies / (layer.m + layer.n))
        costs.append(torch.full_like(energies, times * (layer.m + layer.n)))
    price = last_rate(rates, costs, _numbers(loras, recipe))

    def width_for(layer: Layer, energies: Tensor) -> int:
        if len(energies) <= _LEAST:
            return _LEAST
        worth = int((energies > price * (layer.m + layer.n)).sum())
        return int(_PER_RANK * worth) + _STEP

    return width_for


def _numbers(loras: LoraSet, recipe: Recipe) -> float:
    """Returns how many numbers the shared LoRAs hold."""
    if recipe.budget is not None:
        return recipe.budget / DTYPES_BY_WORD[recipe.factors_dtype].itemsize
    return float(sum(recipe.ranks) * sum(layer.m + layer.n for layer in loras.layers))


def factor_pair(file: InputLora, layer: Layer) -> FactorPair:  # (m, r), (r, n), float32
    """Returns what a LoRA changes in a layer, as factors; without any rank where it has no module."""
    if layer.module in file.modules:
        return file.factors(layer.module, torch.float32)
    return torch.zeros(layer.m, 0), torch.zeros(0, layer.n)
