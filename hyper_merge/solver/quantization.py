"""Rounds blocks, in the layers' coordinates, as the files hold them, and computes their sums."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from hyper_merge.analysis.contents import Analysis
from hyper_merge.checkpoints.io.dtypes import FLOAT8
from hyper_merge.decomposition.linalg import (
    block_gram,
    block_sums,
    largest_values,
)
from hyper_merge.decomposition.normalization import balance, unit_scales
from hyper_merge.errors import NonFiniteError
from hyper_merge.loras.lora_file import StoredFormat, as_hosts_apply
from hyper_merge.runtime.parallel import ParallelMap
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.block_sides import BlockSide, LayerSide
from hyper_merge.solver.float8 import (
    RefitTarget,
    float8_alpha,
    is_in_range,
    rounded_and_refitted,
)
from hyper_merge.solver.low_rank_layer import empty_layer
from hyper_merge.solver.metric import Metric
from hyper_merge.solver.products import FactorPair, Products, StoredFactors, keep_pairs
from hyper_merge.solver.rank_pruning import given_away
from hyper_merge.solver.rounding import DOWNS, UPS, RoundedSides, Rounding
from hyper_merge.solver.solution import LowRankSolution

_PHASE: Final = "preparing the LoRAs"


def quantize(
    metric: Metric,
    solution: LowRankSolution,
    groups: Mapping[str, Sequence[int]],  # the layers of each set of multipliers
    alphas: Sequence[float | None],  # of the R files
    dtype: torch.dtype,
    progress: Progress,
) -> StoredFactors:
    """Brings blocks to the layers' coordinates, scaled, balanced and rounded as files hold them.

    Each block is scaled so that its largest multiplier among the checkpoints is 1.

    Args:
        metric: of the loss.
        solution: the blocks between the layers' bases, which are taken out of it, and their
            multipliers.
        groups: the layers of each set of multipliers, by name.
        alphas: of the R files; those of float8 are chosen here instead, and their factors are
            fitted again after rounding.
        dtype: of the stored factors.
        progress: progress and interrupt.

    Raises:
        NonFiniteError: the type cannot hold a factor.
    """
    layers = deque(
        _SolvedLayer(index, solution.factors.pop(index, None), group)
        for name, members in groups.items()
        for group in [_scaled_group(solution.multipliers[name], metric)]
        for index in members
    )
    indices = [layer.index for layer in layers]
    sizes = {index: layer.m + layer.n for index, layer in enumerate(metric.analysis.layers)}
    counter = progress.counter(_PHASE, sizes)
    rounded: dict[int, _RoundedLayer] = {}
    with metric.analysis.maps(torch.device("cpu"), progress.check, _PHASE) as maps:
        if dtype == FLOAT8:
            alphas = _float8_alphas(layers, maps.layers)
        formats = [StoredFormat(alpha, dtype) for alpha in alphas]
        round_one = partial(_round_layer, formats, progress.check)
        results = maps.layers(round_one, given_away(layers))
        for index, result in zip(indices, results, strict=True):
            rounded[index] = result
            counter.finish(index)
    return _as_stored([rounded[index] for index in sorted(rounded)], alphas)


def rounded_again(
    metric: Metric,
    factors: Sequence[Sequence[FactorPair]],
    alphas: Sequence[float | None],
    dtype: torch.dtype,
    check: Callable[[], None],
) -> StoredFactors:
    """Rounds factors that take the place of written ones.

    Args:
        metric: of the loss.
        factors: per layer and block: (m, r), (r, n), as the files are to hold them, but in float32.
        alphas: of the R files.
        dtype: of the stored factors.
        check: called between layers; may raise, to stop.

    Raises:
        NonFiniteError: the type cannot hold a factor.
    """
    formats = [StoredFormat(alpha, dtype) for alpha in alphas]
    round_one = partial(_rounded_again, metric, formats, check)
    # In this process: the factors of all layers are here.
    with metric.analysis.maps(torch.device("cpu"), check, _PHASE) as maps:
        return _as_stored(list(maps.small(round_one, range(len(factors)), factors)), alphas)


def _rounded_again(
    metric: Metric,
    formats: Sequence[StoredFormat],
    check: Callable[[], None],
    index: int,
    pairs: Sequence[FactorPair],
) -> _RoundedLayer:
    """Rounds blocks that need not lie between the layer's bases."""
    check()
    if not any(up.shape[1] for up, _ in pairs):
        return _empty_layer(metric.analysis, index, formats)
    rounding = _rounding(metric, index, [up.shape[1] for up, _ in pairs], formats)
    ups, downs = zip(
        *(as_hosts_apply(*pair, x.alpha) for pair, x in zip(pairs, formats, strict=True)),
        strict=True,
    )
    columns = torch.cat(ups, 1), torch.cat(downs).mT
    exact = [
        BlockSide(side, of_layer.basis.mT @ side)
        for side, of_layer in zip(columns, rounding.sides, strict=True)
    ]
    if formats[0].dtype == FLOAT8:
        grams = [side.mT @ side for side in columns]
        if not all(
            is_in_range(rounding, columns[place], grams[place], grams[1 - place])
            for place in (UPS, DOWNS)
        ):
            raise NonFiniteError(
                f"{rounding.layer.module}: files of float8 do not hold its factors"
            )
    sides = rounding.side(exact[UPS], UPS), rounding.side(exact[DOWNS], DOWNS)
    products = _products(metric.analysis, index, rounding, sides, metric.layers[index].scale)
    pairs = rounding.stored_pairs(sides)
    return _RoundedLayer(keep_pairs(metric.analysis.scratch.keep, pairs), *products)


def _rounding(
    metric: Metric, index: int, ranks: Sequence[int], formats: Sequence[StoredFormat]
) -> Rounding:
    layer, of_layer = metric.analysis.layers[index], metric.layers[index]
    left, right = metric.analysis.bases(index)
    sides = LayerSide(left, of_layer.left), LayerSide(right, of_layer.right)
    return Rounding(layer, sides, ranks, formats)


def _as_stored(layers: Sequence[_RoundedLayer], alphas: Sequence[float | None]) -> StoredFactors:
    """Returns the layers in their order."""
    return StoredFactors(
        factors=[layer.factors for layer in layers],
        plain=_stack([layer.plain for layer in layers]),
        weighted=_stack([layer.weighted for layer in layers]),
        alphas=tuple(alphas),
    )


def _stack(layers: Sequence[Products]) -> Products:
    return Products(
        torch.stack([layer.cross for layer in layers]),
        torch.stack([layer.gram for layer in layers]),
    )


@dataclass(frozen=True, eq=False)
class _ScaledGroup:
    """The values that layers with shared multipliers have in common."""

    scales: Tensor  # (R,), of the blocks
    multipliers: Tensor  # (d, R), of the scaled blocks, for weighted slices
    metric: Metric


def _scaled_group(
    multipliers: Tensor,  # (k, R)
    metric: Metric,
) -> _ScaledGroup:
    scales = unit_scales(multipliers)
    weighted = torch.linalg.pinv(metric.to_deviations) @ multipliers.double()
    return _ScaledGroup(scales, weighted / scales, metric)


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
    plain: Products  # of this layer: cross (d + 1, R)
    weighted: Products


def _round_layer(
    formats: Sequence[StoredFormat],  # of the R files
    check: Callable[[], None],
    solved: _SolvedLayer,
) -> _RoundedLayer:
    index, group = solved.index, solved.group
    metric, analysis = group.metric, group.metric.analysis
    if solved.pairs is None:
        return _empty_layer(analysis, index, formats)
    pairs = [
        _scaled((up.cpu(), down.cpu()), scale)
        for (up, down), scale in zip(solved.pairs, group.scales.tolist(), strict=True)
    ]
    check()
    of_layer = metric.layers[index]
    rounding = _rounding(metric, index, [up.shape[1] for up, _ in pairs], formats)
    ups, downs = zip(*pairs, strict=True)
    within = torch.cat(ups, 1), torch.cat(downs).mT
    is_fitted_again = formats[0].dtype == FLOAT8 and not rounding.layer.whole
    if is_fitted_again:
        target = RefitTarget(metric.mixed(analysis.core(index)), group.multipliers)
        sides = rounded_and_refitted(target, rounding, within, check)
    else:
        up, down = (rounding.spanned(side, place) for place, side in enumerate(within))
        sides = rounding.side(up, UPS), rounding.side(down, DOWNS)
    check()
    if analysis.has_many and of_layer.is_plain and not is_fitted_again:
        products = _products_between_bases(analysis, index, of_layer.scale, pairs)
    else:
        products = _products(analysis, index, rounding, sides, of_layer.scale)
    return _RoundedLayer(keep_pairs(analysis.scratch.keep, rounding.stored_pairs(sides)), *products)


def _products(
    analysis: Analysis, index: int, rounding: Rounding, sides: RoundedSides, scale: float
) -> tuple[Products, Products]:
    """Returns the products of one layer, plain and as the loss counts them."""
    ranks = list(rounding.ranks)
    ups, downs = (side.applied for side in sides)
    left, right = (side.inner for side in sides)

    def cross(left: Tensor, right: Tensor) -> Tensor:  # (p, r), (q, r), of all blocks
        pairs = zip(torch.split(left, ranks, 1), torch.split(right, ranks, 1), strict=True)
        return analysis.products(index, [(up, down.mT) for up, down in pairs])

    plain = Products(cross(ups.within, downs.within), block_sums(left.gram * right.gram, ranks))
    if all(side.stretch.changes_nothing for side in rounding.sides):
        return plain, Products(plain.cross * scale, plain.gram * scale)
    weighted = cross(left.dual, right.dual)
    gram = block_sums(left.weighted_gram * right.weighted_gram, ranks)
    return plain, Products(weighted * scale, gram * scale)


def _products_between_bases(
    analysis: Analysis, index: int, scale: float, pairs: Sequence[FactorPair]
) -> tuple[Products, Products]:
    """Returns the products of one layer before its rounding, which changes them in second order only."""
    ups, downs = zip(*pairs, strict=True)
    plain = Products(analysis.products(index, pairs), block_gram(ups, downs))
    return plain, Products(plain.cross * scale, plain.gram * scale)


def _float8_alphas(layers: deque[_SolvedLayer], parallel: ParallelMap) -> list[float]:
    """Returns the alpha of every block's file, by the largest of its layers."""
    sizes = list(parallel(_sizes, layers))
    blocks = len(layers[0].group.scales)
    return [float8_alpha(max(row[block] for row in sizes)) for block in range(blocks)]


def _sizes(layer: _SolvedLayer) -> list[float]:
    """Returns rank times largest singular value of each block."""
    scales = layer.group.scales.abs().tolist()
    if layer.pairs is None:
        return [0.0] * len(scales)
    ups, downs = zip(*layer.pairs, strict=True)
    up, down, ranks = torch.cat(ups, 1), torch.cat(downs), [up.shape[1] for up in ups]
    largest = largest_values(up.mT @ up, down @ down.mT, ranks)
    return [rank * x * value for rank, x, value in zip(ranks, scales, largest, strict=True)]


def _scaled(pair: FactorPair, scale: float) -> FactorPair:
    up, down = pair
    return balance(up * scale, down) if up.shape[1] else pair


def _empty_layer(analysis: Analysis, index: int, formats: Sequence[StoredFormat]) -> _RoundedLayer:
    """Returns a layer in which no block has any rank."""
    layer, blocks, dtype = analysis.layers[index], len(formats), formats[0].dtype
    rows = analysis.contrasts.dimensions + 1
    empty = empty_layer(layer, dtype)
    zeros = torch.zeros(rows + blocks, blocks, dtype=torch.float64)
    nothing = Products(zeros[:rows], zeros[rows:])
    return _RoundedLayer([(empty.up, empty.down)] * blocks, nothing, nothing)
