"""Rounds blocks, in the layers' coordinates, as the files hold them, and computes their sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hyper_merge.analysis.loss_weights import LossWeights
from hyper_merge.analysis.store import Analysis
from hyper_merge.checkpoints.io.dtypes import FLOAT8
from hyper_merge.decomposition.linalg import block_columns, block_gram, largest_value
from hyper_merge.decomposition.normalization import balance, unit_scales
from hyper_merge.loras.lora_file import StoredFormat, as_hosts_apply, stored_factors
from hyper_merge.runtime.parallel import parallel_map, return_memory
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.float8 import FactorPair, RefitTarget, float8_alpha, refit
from hyper_merge.solver.low_rank_layer import empty_layer
from hyper_merge.solver.solve import LowRankSolution

_LAYERS_PER_RETURN: Final = 50  # of memory to the system


@dataclass(frozen=True, eq=False)
class StoredFactors:
    """Blocks as the files will hold them, with all that multipliers and losses need."""

    factors: list[list[FactorPair]]  # per layer and block: (m, r), (r, n), as stored
    cross: Tensor  # (layers, d + 1, R), float64: <slices and the average's rounding error, block>
    gram: Tensor  # (layers, R, R), float64: <block, block>
    alphas: tuple[float | None, ...]  # of the R files

    @property
    def ranks(self) -> list[tuple[int, ...]]:
        """The ranks of the R blocks, per layer."""
        return [tuple(up.shape[1] for up, _ in pairs) for pairs in self.factors]


def quantize(
    analysis: Analysis,
    solution: LowRankSolution,
    groups: Mapping[str, Sequence[int]],  # the layers of each set of multipliers
    alphas: Sequence[float | None],  # of the R files
    dtype: torch.dtype,
    weights: LossWeights,
    progress: Progress,
) -> StoredFactors:
    """Brings blocks to the layers' coordinates, scaled, balanced and rounded as files hold them.

    Each block is scaled so that its largest multiplier among the checkpoints is 1.

    Args:
        analysis: of the checkpoints.
        solution: the blocks between the layers' bases, and their multipliers.
        groups: the layers of each set of multipliers, by name.
        alphas: of the R files; those of float8 are chosen here instead, and their factors are
            fitted again after rounding.
        dtype: of the stored factors.
        weights: how much the layers' squared errors count.
        progress: progress and interrupt.

    Raises:
        NonFiniteError: the type cannot hold a factor.
    """
    layers = [
        _SolvedLayer(index, solution.factors.get(index), group)
        for name, members in groups.items()
        for group in [_scaled_group(solution.multipliers[name], weights)]
        for index in members
    ]
    if dtype == FLOAT8:
        alphas = _float8_alphas(layers, progress)
    formats = [StoredFormat(alpha, dtype) for alpha in alphas]
    sizes = {index: layer.m + layer.n for index, layer in enumerate(analysis.layers)}
    counter = progress.counter("preparing the LoRAs", sizes)

    def round_one(layer: _SolvedLayer) -> _RoundedLayer:
        return _round_layer(analysis, layer, formats, progress.check)

    rounded: dict[int, _RoundedLayer] = {}
    with parallel_map(torch.device("cpu"), progress.check) as parallel:
        for layer, result in zip(layers, parallel(round_one, layers), strict=True):
            rounded[layer.index] = result
            counter.finish(layer.index)
            if len(rounded) % _LAYERS_PER_RETURN == 0:
                return_memory()
    ordered = [rounded[index] for index in sorted(rounded)]
    return StoredFactors(
        factors=[result.factors for result in ordered],
        cross=torch.stack([result.cross for result in ordered]),
        gram=torch.stack([result.gram for result in ordered]),
        alphas=tuple(alphas),
    )


@dataclass(frozen=True, eq=False)
class _ScaledGroup:
    """The values that layers with shared multipliers have in common."""

    scales: Tensor  # (R,), of the blocks
    multipliers: Tensor  # (d, R), of the scaled blocks, for weighted slices
    weights: LossWeights


def _scaled_group(
    multipliers: Tensor,  # (k, R)
    weights: LossWeights,
) -> _ScaledGroup:
    scales = unit_scales(multipliers)
    weighted = torch.linalg.pinv(weights.to_deviations) @ multipliers.double()
    return _ScaledGroup(scales, weighted / scales, weights)


@dataclass(frozen=True, eq=False)
class _SolvedLayer:
    """One layer as the solver leaves it."""

    index: int
    pairs: list[FactorPair] | None  # per block (p, r), (r, q); None where no block has any rank
    group: _ScaledGroup


@dataclass(frozen=True, eq=False)
class _RoundedLayer:
    """One layer as files will hold it."""

    factors: list[FactorPair]  # per block (m, r), (r, n)
    cross: Tensor  # (d + 1, R)
    gram: Tensor  # (R, R)


def _round_layer(
    analysis: Analysis,
    solved: _SolvedLayer,
    formats: Sequence[StoredFormat],  # of the R files
    check: Callable[[], None],
) -> _RoundedLayer:
    index, group = solved.index, solved.group
    if solved.pairs is None:
        return _empty_layer(analysis, index, formats)
    layer, core = analysis.layers[index], analysis.core(index)
    left, right = bases = analysis.bases(index)
    pairs = [(up.cpu(), down.cpu()) for up, down in solved.pairs]
    factors: list[FactorPair] = []
    for pair, scale, stored in zip(pairs, group.scales.tolist(), formats, strict=True):
        check()
        up, down = _in_layer(bases, pair, scale)
        factors.append(stored_factors(layer, up, down, stored.alpha, stored.dtype))
    if formats[0].dtype == FLOAT8 and not layer.whole:
        target = RefitTarget(group.weights.slices(core), bases, group.multipliers)
        factors = refit(target, layer, factors, [stored.alpha for stored in formats], check)
    products, ups, downs = [], [], []
    for stored_pair, stored in zip(factors, formats, strict=True):
        check()
        up, down = as_hosts_apply(*stored_pair, stored.alpha)
        products.append((block_columns(left, up) @ block_columns(right, down.mT).mT).flatten())
        ups.append(up)
        downs.append(down)
    rows = torch.cat([core, analysis.rounding(index)[None]])
    cross = rows.flatten(1).double() @ torch.stack(products, 1).double()
    return _RoundedLayer(factors, cross, block_gram(ups, downs))


def _float8_alphas(layers: Sequence[_SolvedLayer], progress: Progress) -> list[float]:
    """Returns the alpha of every block's file, by the largest of its layers."""
    sizes: list[list[float]] = []
    for layer in layers:
        progress.check()
        if layer.pairs is not None:
            scaled = zip(layer.pairs, layer.group.scales.abs().tolist(), strict=True)
            sizes.append([up.shape[1] * x * largest_value(up, down) for (up, down), x in scaled])
    blocks = len(layers[0].group.scales)
    return [
        float8_alpha(max((row[block] for row in sizes), default=0.0)) for block in range(blocks)
    ]


def _in_layer(
    bases: tuple[Tensor, Tensor],  # (m, p), (n, q)
    pair: FactorPair,  # (p' <= p, r), (r, q' <= q): in the bases' first columns
    scale: float,
) -> tuple[Tensor, Tensor]:  # (m, r), (r, n)
    """Returns a block in the layer's own coordinates."""
    up, down = pair
    if up.shape[1]:
        up, down = balance(up * scale, down)
    return bases[0][:, : len(up)] @ up, down @ bases[1][:, : down.shape[1]].mT


def _empty_layer(analysis: Analysis, index: int, formats: Sequence[StoredFormat]) -> _RoundedLayer:
    """Returns a layer in which no block has any rank."""
    layer, blocks, dtype = analysis.layers[index], len(formats), formats[0].dtype
    rows = analysis.contrasts.dimensions + 1
    empty = empty_layer(layer, dtype)
    zeros = torch.zeros(rows + blocks, blocks, dtype=torch.float64)
    return _RoundedLayer([(empty.up, empty.down)] * blocks, zeros[:rows], zeros[rows:])
