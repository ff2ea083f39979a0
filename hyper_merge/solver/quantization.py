"""Blocks in the layers' own coordinates, rounded as the files hold them, with all sums that follow."""

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
from hyper_merge.loras.lora_file import as_hosts_apply, stored_factors
from hyper_merge.runtime.parallel import parallel_map, return_memory
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.float8 import Pair, RefitTarget, float8_alpha, refit
from hyper_merge.solver.solve import LowRankSolution

_LAYERS_PER_RETURN: Final = 50  # of memory to the system


@dataclass(frozen=True, eq=False)
class StoredFactors:
    """Blocks as the files will hold them, with all that multipliers and losses need."""

    factors: list[list[Pair]]  # per layer and block: (m, r), (r, n), as stored
    cross: Tensor  # (layers, d + 1, R), float64: <slices and the average's rounding error, block>
    gram: Tensor  # (layers, R, R), float64: <block, block>
    alphas: tuple[float | None, ...]  # of the R files

    @property
    def ranks(self) -> list[tuple[int, ...]]:
        """Of the R blocks, per layer."""
        return [tuple(up.shape[1] for up, _ in pairs) for pairs in self.factors]


def quantize(
    analysis: Analysis,
    found: LowRankSolution,
    groups: Mapping[str, Sequence[int]],  # the layers of each set of multipliers
    stored: tuple[Sequence[float | None], torch.dtype],  # alphas of the R files, type
    weighting: LossWeights,
    progress: Progress,
) -> StoredFactors:
    """Blocks in the layers' coordinates, scaled, balanced and rounded as the files hold them.

    Each block is scaled so that its largest multiplier among the checkpoints is 1. Files of float8
    get alphas of their own in place of the given ones, and their factors are fitted again.
    """
    jobs = [
        (index, found.factors.get(index), group)
        for name, members in groups.items()
        for group in [_group(found.multipliers[name], weighting)]
        for index in members
    ]
    if stored[1] == FLOAT8:
        stored = _float8_alphas(jobs, progress), FLOAT8
    sizes = {index: layer.m + layer.n for index, layer in enumerate(analysis.layers)}
    counter = progress.counter("preparing the LoRAs", sizes)

    def job(index: int, pairs: list[Pair] | None, group: _Group) -> tuple[int, _RoundedLayer]:
        if pairs is None:
            return index, _nothing(analysis, index, len(stored[0]), stored[1])
        own = [(up.cpu(), down.cpu()) for up, down in pairs]
        return index, _round_layer(analysis, index, own, group, stored, progress.check)

    layers: dict[int, _RoundedLayer] = {}
    with parallel_map(torch.device("cpu"), progress.check) as each:
        for index, layer in each(job, *zip(*jobs, strict=True)):
            layers[index] = layer
            counter.finish(index)
            if len(layers) % _LAYERS_PER_RETURN == 0:
                return_memory()
    ordered = [layers[index] for index in sorted(layers)]
    return StoredFactors(
        factors=[layer.factors for layer in ordered],
        cross=torch.stack([layer.cross for layer in ordered]),
        gram=torch.stack([layer.gram for layer in ordered]),
        alphas=tuple(stored[0]),
    )


@dataclass(frozen=True, eq=False)
class _Group:
    """What the layers that share multipliers have in common."""

    scales: Tensor  # (R,), of the blocks
    multipliers: Tensor  # (d, R), of the scaled blocks, for weighted slices
    weighting: LossWeights


def _group(
    multipliers: Tensor,  # (k, R)
    weighting: LossWeights,
) -> _Group:
    scales = unit_scales(multipliers)
    weighted = torch.linalg.pinv(weighting.to_deviations) @ multipliers.double()
    return _Group(scales, weighted / scales, weighting)


@dataclass(frozen=True, eq=False)
class _RoundedLayer:
    factors: list[Pair]  # per block (m, r), (r, n)
    cross: Tensor  # (d + 1, R)
    gram: Tensor  # (R, R)


def _round_layer(
    analysis: Analysis,
    index: int,
    pairs: Sequence[Pair],  # per block (p, r), (r, q)
    group: _Group,
    stored: tuple[Sequence[float | None], torch.dtype],
    check: Callable[[], None],
) -> _RoundedLayer:
    layer, core = analysis.layers[index], analysis.core(index)
    left, right = bases = analysis.bases(index)
    factors: list[Pair] = []
    for pair, scale, alpha in zip(pairs, group.scales.tolist(), stored[0], strict=True):
        check()
        factors.append(stored_factors(layer, *_outside(bases, pair, scale), alpha, stored[1]))
    if stored[1] == FLOAT8:
        target = RefitTarget(group.weighting.slices(core), bases, group.multipliers)
        factors = refit(target, layer, factors, stored[0], check)
    products, ups, downs = [], [], []
    for stored_pair, alpha in zip(factors, stored[0], strict=True):
        check()
        up, down = as_hosts_apply(*stored_pair, alpha)
        products.append((block_columns(left, up) @ block_columns(right, down.mT).mT).flatten())
        ups.append(up)
        downs.append(down)
    rows = torch.cat([core, analysis.rounding(index)[None]])
    cross = rows.flatten(1).double() @ torch.stack(products, 1).double()
    return _RoundedLayer(factors, cross, block_gram(ups, downs))


def _float8_alphas(
    jobs: Sequence[tuple[int, list[Pair] | None, _Group]], progress: Progress
) -> list[float]:
    """Of every block's file, by the largest of its layers."""
    sizes: list[list[float]] = []
    for _, pairs, group in jobs:
        progress.check()
        if pairs is not None:
            found = zip(pairs, group.scales.abs().tolist(), strict=True)
            sizes.append([up.shape[1] * x * largest_value(up, down) for (up, down), x in found])
    blocks = len(jobs[0][2].scales)
    return [
        float8_alpha(max((row[block] for row in sizes), default=0.0)) for block in range(blocks)
    ]


def _outside(
    bases: tuple[Tensor, Tensor],  # (m, p), (n, q)
    pair: Pair,  # (p' <= p, r), (r, q' <= q): in the bases' first columns
    scale: float,
) -> tuple[Tensor, Tensor]:  # (m, r), (r, n)
    """A block in the layer's own coordinates."""
    up, down = pair
    if up.shape[1]:
        up, down = balance(up * scale, down)
    return bases[0][:, : len(up)] @ up, down @ bases[1][:, : down.shape[1]].mT


def _nothing(analysis: Analysis, index: int, blocks: int, dtype: torch.dtype) -> _RoundedLayer:
    """A layer in which no block has any rank."""
    layer = analysis.layers[index]
    rows = analysis.contrasts.dimensions + 1
    # not zeros: up to torch 2.3 nothing of float8 can be filled without an entry
    pair = torch.empty(layer.m, 0, dtype=dtype), torch.empty(0, layer.n, dtype=dtype)
    zeros = torch.zeros(rows + blocks, blocks, dtype=torch.float64)
    return _RoundedLayer([pair] * blocks, zeros[:rows], zeros[rows:])
