"""Tells about how much of a GPU's memory the work on one tensor takes, at most."""

from __future__ import annotations

from typing import Final

from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.checkpoints.architectures.layout import Treatment

# Of an entry, beside its slices: base, rounding error, a mixture, and what is made of them.
_ENTRY: Final = 20
_CHUNK_ENTRY: Final = 20  # of an entry of a chunk, for each file
_SQUARE: Final = 40  # of an entry of a symmetric matrix of the width, for each slice
_DELTA: Final = 32  # of an entry of a difference of two files, with what is made of it


def pass_bytes(inputs: MergeInputs, key: str, width: int, chunk: int) -> int:
    """Returns what the pass takes for a tensor.

    Args:
        inputs: the files.
        key: the tensor's key.
        width: most columns of the bases; 0 for the average alone.
        chunk: entries that are worked on at once.
    """
    entries, d = _largest_piece(inputs, key), inputs.contrasts.dimensions
    chunks = min(chunk, entries) * _CHUNK_ENTRY * len(inputs.read)
    if not width or inputs.layout.treatments[key] is not Treatment.LAYER:
        return chunks + 4 * entries
    return chunks + entries * (4 * d + _ENTRY) + _SQUARE * d * width**2


def delta_bytes(inputs: MergeInputs, key: str) -> int:
    """Returns what a tensor's difference in two files takes, with a low-rank approximation of it."""
    return _DELTA * _largest_piece(inputs, key)


def _largest_piece(inputs: MergeInputs, key: str) -> int:
    """Returns the entries of a tensor, or of the largest layer in it."""
    layers = [inputs.layout.layers[index] for _, index in inputs.pieces(key) if index is not None]
    return max((layer.m * layer.n for layer in layers), default=inputs.read[0].tensors[key].numel)
