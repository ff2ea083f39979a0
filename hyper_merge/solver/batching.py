"""Stacks the cores of layers for the solver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

from hyper_merge.analysis.contents import Analysis
from hyper_merge.decomposition.problem import Batch
from hyper_merge.solver.metric import COLUMNS_PER_RANK, LEAST_COLUMNS, Metric, leading_shape

_BATCH_ENTRIES: Final = {"cpu": 2**19, "cuda": 2**25}  # of the cores in one batch
_COLUMN_STEP: Final = 32

Ranks = Sequence[tuple[int, ...]]
"""The ranks of the R blocks, per layer."""


def stack_cores(
    metric: Metric,
    indices: Sequence[int],
    ranks: Ranks,
    device: torch.device,
    check: Callable[[], None],
) -> tuple[Batch, ...]:
    """Stacks the cores of one shape and one list of ranks, in pieces that fit a cache or a GPU.

    Args:
        metric: of the loss, in whose coordinates the cores are.
        indices: of the layers.
        ranks: of all layers.
        device: on which the stacks will lie.
        check: called for every batch; may raise, to stop.
    """
    groups: dict[tuple[tuple[int, int], tuple[int, ...]], list[int]] = {}
    for index in indices:
        shape = _worked_shape(metric.analysis, index, sum(ranks[index]))
        groups.setdefault((shape, ranks[index]), []).append(index)
    batches = []
    d = metric.analysis.contrasts.dimensions
    for ((p, q), rank), members in groups.items():
        length = max(_BATCH_ENTRIES[device.type] // (d * p * q), 1)
        for first in range(0, len(members), length):
            check()
            part = tuple(members[first : first + length])
            source = partial(_stacked, metric, part, (p, q), device)
            # On a CPU each is made from the mapped file when it is its turn: that saves most of the
            # memory and takes a tenth of a sweep.
            batches.append(Batch(source if device.type == "cpu" else source(), rank, part))
    return tuple(batches)


def _stacked(
    metric: Metric, indices: Sequence[int], shape: tuple[int, int], device: torch.device
) -> Tensor:  # (b, d, p, q)
    cores = [metric.core(index, shape).contiguous() for index in indices]
    return (torch.stack(cores) if len(cores) > 1 else cores[0][None]).to(device)


def core_bytes(metric: Metric) -> int:
    """Returns the bytes of all cores in float32; what else the solver holds is smaller."""
    analysis, d = metric.analysis, metric.analysis.contrasts.dimensions
    shapes = map(analysis.core_shape, range(len(analysis.layers)))
    return sum(4 * d * p * q for p, q in shapes)


def _worked_shape(analysis: Analysis, index: int, rank: int) -> tuple[int, int]:
    """Returns the shape of the part of a core that is used: the leading one if its bases are ordered."""
    columns = -(-int(COLUMNS_PER_RANK * rank) // _COLUMN_STEP) * _COLUMN_STEP
    return leading_shape(analysis, index, max(columns, LEAST_COLUMNS))
