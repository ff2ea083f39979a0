"""Tells about how much memory the work on one tensor takes, of a GPU or of a CPU, at most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.checkpoints.architectures.layout import Treatment

# Of an entry, beside its slices: base, rounding error, a mixture, and what is made of them.
_ENTRY: Final = 20
_HOST_ENTRY: Final = 12  # the same on a CPU: base, rounding error and a mixture
_CHUNK_ENTRY: Final = 20  # of an entry of a chunk, for each file
_SQUARE: Final = 40  # of an entry of a symmetric matrix of the width, for each slice

HOST_CHUNK: Final = 2**17
"""Entries that a CPU's cache holds of several checkpoints at once."""

IN_FLIGHT: Final = 5 * 2**28
"""Bytes of a CPU's memory that the tensors which are worked on at a time take; one may take more."""

_DELTA: Final = 32  # of an entry of a difference of two files, with what is made of it


def pass_bytes(inputs: MergeInputs, key: str, width: int, chunk: int, entry: int = _ENTRY) -> int:
    """Returns what the pass takes for a tensor.

    Args:
        inputs: the files.
        key: the tensor's key.
        width: most columns of the bases; 0 for the average alone.
        chunk: entries that are worked on at once.
        entry: bytes of an entry beside its slices.
    """
    entries, d = _largest_piece(inputs, key), inputs.contrasts.kept
    chunks = min(chunk, entries) * _CHUNK_ENTRY * len(inputs.read)
    if not width or inputs.layout.treatments[key] is not Treatment.LAYER:
        return chunks + 4 * entries
    return chunks + entries * (4 * d + entry) + _SQUARE * d * width**2


def host_bytes(inputs: MergeInputs, key: str, width_of: Callable[[int], int]) -> int:
    """Returns what the pass takes of a CPU's memory for a tensor.

    Args:
        inputs: the files.
        key: the tensor's key.
        width_of: returns the most columns of a layer's bases by its index.
    """
    indices = [index for _, index in inputs.pieces(key) if index is not None]
    width = max(map(width_of, indices), default=0)
    return pass_bytes(inputs, key, width, HOST_CHUNK, _HOST_ENTRY)


def bytes_in_flight(inputs: MergeInputs, width: int, workers: int, limit: int = IN_FLIGHT) -> int:
    """Returns what the pass takes of a CPU's memory at the peak.

    Args:
        inputs: the files.
        width: most columns of the bases.
        workers: tensors that are worked on at a time, if they are small.
        limit: bytes of all of them together; one may take more.
    """
    largest = max(
        host_bytes(inputs, key, lambda _index: width)
        for key, treatment in inputs.layout.treatments.items()
        if treatment is Treatment.LAYER
    )
    return max(largest, min(workers * largest, limit))


def delta_bytes(inputs: MergeInputs, key: str) -> int:
    """Returns what a tensor's difference in two files takes, with a low-rank approximation of it."""
    return _DELTA * _largest_piece(inputs, key)


def _largest_piece(inputs: MergeInputs, key: str) -> int:
    """Returns the entries of a tensor, or of the largest layer in it."""
    layers = [inputs.layout.layers[index] for _, index in inputs.pieces(key) if index is not None]
    return max((layer.m * layer.n for layer in layers), default=inputs.read[0].tensors[key].numel)
