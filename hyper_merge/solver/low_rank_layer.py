"""The best factors of one layer's delta."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.decomposition.linalg import energy_of, product_energy
from hyper_merge.decomposition.truncated_svd import truncated_svd
from hyper_merge.loras.lora_file import as_hosts_apply, stored_factors


@dataclass(frozen=True, eq=False)
class LowRankLayer:
    """One layer's part of the file, as it will be stored."""

    layer: Layer
    up: Tensor  # (m, r)
    down: Tensor  # (r, n)
    energy: float  # squared norm of the difference
    error: float  # of what is left of it


def low_rank_layer(
    layer: Layer,
    delta: Tensor,  # (m, n), float32
    rank: int,
    stored: tuple[int | None, torch.dtype],  # alpha of the file, type
    seed: int,
    tick: Callable[[float], None],
) -> LowRankLayer:
    """A layer's difference as factors that are rounded as the file holds them, and what they leave."""
    # A stream of random numbers for each layer: the order of the work does not matter.
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(layer.module.encode()))
    best = truncated_svd(delta, rank, generator, tick)
    alpha, dtype = stored
    factors = stored_factors(layer, best.up, best.down, alpha, dtype)
    up, down = as_hosts_apply(*factors, alpha)
    energy, error = _left(delta, up.to(delta), down.to(delta))
    return LowRankLayer(layer, *factors, energy, error)


def _left(
    delta: Tensor,  # (m, n)
    up: Tensor,  # (m, r)
    down: Tensor,  # (r, n)
) -> tuple[float, float]:
    """Squared norms of a difference and of what the factors leave of it, without dense work.

    ||X - Y||^2 = ||X||^2 - 2 <X, Y> + ||Y||^2.
    """
    energy = energy_of(delta)
    cross = ((up.mT @ delta) * down).sum(dtype=torch.float64)
    return energy, max(energy - 2 * float(cross) + product_energy(up, down), 0.0)
