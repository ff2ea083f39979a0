"""How long a merge will take: the products of its matrices, by what this machine does in a second."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Final

import torch

from hyper_merge.decomposition.core import ITERATIONS
from hyper_merge.decomposition.starts import search_cost
from hyper_merge.sources import Sources, bases_width

# Measured on full-size families of four SD 1.x checkpoints on two cores.
_EFFICIENCY: Final = 0.5  # of a merge's products, against the rate of large ones
_THROUGHPUT: Final = 0.34e9  # bytes in a second: read, hashed, averaged and written
_SWEEPS: Final = 15  # until the loss stands still, with the default tolerance

_STARTS: Final = 7  # that compete

_SIDE: Final = {"cpu": 1024, "cuda": 4096}  # of the matrices by which the rate is measured
_PRODUCTS: Final = 3  # of them, after one to warm up


def seconds_of(products: float, size: int, device: torch.device) -> float:
    """How long work takes.

    Args:
        products: multiplications and additions of numbers.
        size: bytes that are read and written besides.
        device: where the products are done.
    """
    return products / (_EFFICIENCY * rate(device)) + size / _THROUGHPUT


def pass_products(sources: Sources, width: int) -> float:
    """Multiplications and additions of the pass over the files, for an analysis of this width."""
    d = sources.contrasts.dimensions
    total = 0.0
    for layer in sources.layout.layers:
        m, n = layer.m, layer.n
        p, q = bases_width(layer, width)
        if max(m, n) > width and d * min(m, n) > width:
            total += 2 * d * d * m * n + 2 * ITERATIONS * m * n * width
            total += 4 * (m + n) * width * width  # making the bases orthonormal
        total += 2 * (d + 1) * (max(m, n) * min(m, n) * max(p, q) + p * q * min(m, n))
    return total


def solve_products(
    sources: Sources,
    ranks: Sequence[tuple[int, ...]],  # per layer
    width: int,
    iterations: int,
) -> float:
    """Multiplications and additions of the solve on the cores, and of rounding the LoRAs."""
    d = sources.contrasts.dimensions
    sweep, rounding, entries = 0.0, 0.0, 0
    for layer, of_layer in zip(sources.layout.layers, ranks, strict=True):
        p, q = bases_width(layer, width)
        columns = sum(of_layer)
        entries += p * q
        sweep += 4 * d * len(of_layer) * p * q + 6 * p * q * columns
        sweep += 6 * (p + q) * columns**2 + columns**3 * 2 / 3
        rounding += 8 * (layer.m * p + layer.n * q) * columns
    return sweep * (min(iterations, _SWEEPS) + search_cost(entries, _STARTS)) + rounding


@functools.cache
def rate(device: torch.device) -> float:
    """Multiplications and additions in a second, measured once on products of large matrices."""
    side = _SIDE[device.type]
    matrix = torch.linspace(-1, 1, side * side, device=device).view(side, side)
    _multiply(matrix, 1)
    start = time.perf_counter()
    _multiply(matrix, _PRODUCTS)
    return float(2 * side**3 * _PRODUCTS / (time.perf_counter() - start))


def duration_text(seconds: float) -> str:
    """A duration as a person would say it beforehand.

    >>> duration_text(268)
    'about 4 minutes'
    """
    if seconds < 8:
        return "a few seconds"
    if seconds < 90:
        return f"about {round(seconds / 10) * 10} seconds"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} minutes"
    return f"about {round(seconds / 3600, 1):g} hours"


def _multiply(matrix: torch.Tensor, times: int) -> None:
    for _ in range(times):
        float((matrix @ matrix)[0, 0])  # waits for the device
