"""Computes the best factors of one layer's delta."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.decomposition.linalg import energy_of, product_energy
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


def low_rank_layer(
    layer: Layer,
    delta: Tensor,  # (m, n), float32
    rank: int,
    stored: StoredFormat,
    seed: int,
    tick: Callable[[float], None],
) -> LowRankLayer:
    """Returns a layer's delta as factors, rounded as the file holds them, with their error."""
    # A stream of random numbers for each layer: the order of the work does not matter.
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(layer.module.encode()))
    best = truncated_svd(delta, rank, generator, tick)
    factors = stored_factors(layer, best.up, best.down, stored.alpha, stored.dtype)
    up, down = as_hosts_apply(*factors, stored.alpha)
    energy, error = _energy_and_error(delta, up.to(delta), down.to(delta))
    return LowRankLayer(layer, *factors, energy, error)


def empty_layer(layer: Layer, dtype: torch.dtype) -> LowRankLayer:
    """Returns factors of rank 0, for a layer whose delta is zero or gets no rank."""
    # not zeros: up to torch 2.3 nothing of float8 can be filled without an entry
    up, down = torch.empty(layer.m, 0, dtype=dtype), torch.empty(0, layer.n, dtype=dtype)
    return LowRankLayer(layer, up, down, 0.0, 0.0)


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
