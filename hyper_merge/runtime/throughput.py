"""Measures how fast this machine is."""

from __future__ import annotations

import time
from statistics import median
from typing import Final

import torch

# Units of cost (see `cost_model`) done in a second, for each operation that the measured rate counts.
# From full-size families of four SD 1.x checkpoints on two cores.
_COSTS: Final = 0.5

_SIDE: Final = {"cpu": 1024, "cuda": 4096}  # of the square matrices that are multiplied
_WARM_UP, _PRODUCTS = 3, 9  # products, untimed and timed

# Multiplications and additions per second of each of a GPU's multiprocessors, a little below what
# NVIDIA's cards since 2016 do: 64 or 128 units at 1.4 to 2.5 GHz.
_MULTIPROCESSOR: Final = 2.5e11

_MEASURED: Final[dict[torch.device, float]] = {}


def estimate_seconds(cost: float, device: torch.device) -> float:
    """Returns how many seconds some work takes.

    A GPU's rate is taken from its description until a job has measured it (`device_job`): at other
    times a host may be using it.

    Args:
        cost: in multiply-adds of large products, see `cost_model`.
        device: the device that does the work.
    """
    if device.type == "cpu" or device in _MEASURED:
        rate = measure_throughput(device)
    else:
        rate = _MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    return cost / (_COSTS * rate)


def measure_throughput(device: torch.device) -> float:
    """Returns multiplications and additions per second, measured once on products of large matrices."""
    if device not in _MEASURED:
        _MEASURED[device] = _measure(device)
    return _MEASURED[device]


def _measure(device: torch.device) -> float:
    side = _SIDE[device.type]
    matrix = torch.linspace(-1, 1, side * side, device=device).view(side, side)
    for _ in range(_WARM_UP):
        _multiply(matrix)
    return 2 * side**3 / median(_multiply(matrix) for _ in range(_PRODUCTS))


def _multiply(matrix: torch.Tensor) -> float:
    """Returns the seconds of one product: a few of them are often held up by other work."""
    start = time.perf_counter()
    float((matrix @ matrix)[0, 0])  # waits for the device
    return time.perf_counter() - start
