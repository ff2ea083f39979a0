"""Measures how fast this machine is."""

from __future__ import annotations

import functools
import time
from typing import Final

import torch

# Units of cost (see `cost_model`) done in a second, for each operation that the measured rate counts.
# From full-size families of four SD 1.x checkpoints on two cores.
_COSTS: Final = 0.57

_SIDE: Final = {"cpu": 1024, "cuda": 4096}  # of the square matrices that are multiplied
_PRODUCTS: Final = 3  # that are timed, after one to warm up


def estimate_seconds(cost: float, device: torch.device) -> float:
    """Returns how many seconds some work takes.

    Args:
        cost: in multiply-adds of large products, see `cost_model`.
        device: the device that does the work.
    """
    return cost / (_COSTS * measure_throughput(device))


@functools.cache
def measure_throughput(device: torch.device) -> float:
    """Returns multiplications and additions per second, measured once on products of large matrices."""
    side = _SIDE[device.type]
    matrix = torch.linspace(-1, 1, side * side, device=device).view(side, side)
    _multiply(matrix, 1)
    start = time.perf_counter()
    _multiply(matrix, _PRODUCTS)
    return float(2 * side**3 * _PRODUCTS / (time.perf_counter() - start))


def _multiply(matrix: torch.Tensor, times: int) -> None:
    for _ in range(times):
        float((matrix @ matrix)[0, 0])  # waits for the device
