"""The modules that diffusers has where a checkpoint stores several as one matrix, or calls them otherwise.

Sources: diffusers' `loaders/single_file_utils.py`, which converts such checkpoints, and the table by which
ComfyUI's `utils.py` puts LoRAs of diffusers' names onto rows of fused weights; they agree.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from hyper_merge.checkpoints.io.header import Shape

_BLOCK: Final = re.compile(r"(\w+)\.(\d+)\.(.+)")
_LAST_NORM: Final = "adaLN_modulation.1"


@dataclass(frozen=True)
class SplitModule:
    """A module of diffusers that is some rows of a checkpoint's matrix."""

    path: str  # dotted, in diffusers
    rows: tuple[int, int]  # of the checkpoint's matrix: first, end
    swapped: bool = False  # its two halves are in the other order


def split_modules(
    path: str, shape: Shape, names: Mapping[str, tuple[str, ...]]
) -> tuple[SplitModule, ...]:
    """Returns the modules of diffusers that a matrix holds, by a family's table.

    Several names are those of query, key and value, or of these and the first layer of an MLP, from the
    first row on. The query has as many rows as the matrix has columns. Without an MLP key and value share
    the rest; with one they have as many rows as the query.

    The modulation of a last norm is shift and scale in checkpoints, scale and shift in diffusers
    (`AdaLayerNormContinuous`). It is the only one that makes two vectors of the network's width.

    Args:
        path: dotted, within the network.
        shape: as stored; what is no matrix has one name at most.
        names: diffusers' names by the checkpoint's, with `#` in place of the block's number.
    """
    block = _BLOCK.fullmatch(path)
    kind, number = (f"{block[1]}.#.{block[3]}", block[2]) if block else (path, "")
    parts = names.get(kind, ())
    if not parts or (len(shape) != 2 and len(parts) > 1):
        return ()
    ends = (0, *itertools.accumulate(_heights(shape[0], shape[1], len(parts))))
    rows = list(itertools.pairwise(ends))
    if ends[-1] != shape[0] or any(first >= end for first, end in rows):
        return ()
    swapped = path.endswith(_LAST_NORM) and shape[0] == 2 * shape[1]
    return tuple(
        SplitModule(name.replace("#", number), span, swapped)
        for name, span in zip(parts, rows, strict=True)
    )


def no_split_modules(path: str, shape: Shape) -> tuple[SplitModule, ...]:  # noqa: ARG001 - the form of a rule
    """Returns nothing: diffusers' names are the checkpoint's, or LoRA files are written in them."""
    return ()


def _heights(m: int, n: int, count: int) -> tuple[int, ...]:
    """Returns the rows of each of `count` modules in a matrix of m x n."""
    if count == 1:
        return (m,)
    if count == 3:  # query, key, value
        return (n, (m - n) // 2, (m - n) // 2)
    return (n, n, n, m - 3 * n)  # and an MLP
