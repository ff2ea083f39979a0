"""Computes the best factors of one layer's delta."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.decomposition.linalg import energy_of, product_energy
from hyper_merge.decomposition.normalization import balance
from hyper_merge.decomposition.stretch import LayerMetric
from hyper_merge.decomposition.truncated_svd import truncated_svd
from hyper_merge.loras.lora_file import StoredFormat, as_hosts_apply, stored_factors


@dataclass(frozen=True, eq=False)
class LowRankLayer:
    """One layer's factors, as a file will hold them."""

    layer: Layer
    up: Tensor  # (m, r)
    down: Tensor  # (r, n)
    energy: float  # squared norm of the delta
    error: float  # squared norm of what the factors leave of it
    weighted_energy: float  # the same as the loss counts them
    weighted_error: float


def low_rank_layer(
    layer: Layer,
    delta: Tensor,  # (m, n), float32
    rank: int,
    stored: StoredFormat,
    seed: int,
    tick: Callable[[float], None],
    metric: LayerMetric | None = None,
) -> LowRankLayer:
    """Returns a layer's delta as factors, rounded as the file holds them, with their error.

    Args:
        layer: the layer.
        delta: its difference.
        rank: of the factors.
        stored: how a file holds them.
        seed: of the random numbers.
        tick: called with the work that is done; may raise, to stop.
        metric: how errors count; None for plain squares.
    """
    # A stream of random numbers for each layer: the order of the work does not matter.
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(layer.module.encode()))
    weighted = delta if metric is None else metric.apply(delta)
    best = truncated_svd(weighted, rank, generator, tick)
    pair = best.up, best.down
    if metric is not None:
        pair = balance(*metric.undo(*pair))
    factors = stored_factors(layer, *pair, stored.alpha, stored.dtype)
    applied = [part.to(delta) for part in as_hosts_apply(*factors, stored.alpha)]
    plain = squares = _energy_and_error(delta, *applied)
    if metric is not None:
        squares = _energy_and_error(weighted, *metric.apply_to_factors(*applied))
    return LowRankLayer(layer, *factors, *plain, *squares)


def empty_layer(layer: Layer, dtype: torch.dtype) -> LowRankLayer:
    """Returns factors of rank 0, for a layer whose delta is zero or gets no rank."""
    # not zeros: up to torch 2.3 nothing of float8 can be filled without an entry
    up, down = torch.empty(layer.m, 0, dtype=dtype), torch.empty(0, layer.n, dtype=dtype)
    return LowRankLayer(layer, up, down, 0.0, 0.0, 0.0, 0.0)


def _energy_and_error(
    delta: Tensor,  # (m, n)
    up: Tensor,  # (m, r)
    down: Tensor,  # (r, n)
) -> tuple[float, float]:
    """Returns squared norms of a delta and of what factors leave of it, without dense work.

    ||X - Y||^2 = ||X||^2 - 2 <X, Y> + ||Y||^2.
    """
    energy = energy_of(delta)
    cross = ((up.mT @ delta) * down).sum(dtype=torch.float64)
    return energy, max(energy - 2 * float(cross) + product_energy(up, down), 0.0)
