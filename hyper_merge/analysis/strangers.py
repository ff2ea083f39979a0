"""Finds checkpoints that have the keys and shapes of the others and little else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from hyper_merge.analysis.contents import Analysis
from hyper_merge.decomposition.contrasts import energies
from hyper_merge.decomposition.linalg import share

# Of the weights' size. Fine-tunes of one base differ by some hundredths to a quarter of it, networks
# that were trained apart by all of it and more.
_FAR: Final = 0.5


def find_strangers(analysis: Analysis, names: Sequence[str]) -> list[str]:
    """Returns a warning for each checkpoint that is far from the average.

    Args:
        analysis: of the checkpoints.
        names: of the checkpoints.
    """
    squares = energies(analysis.grams, analysis.contrasts).sum(0)  # (k,)
    distances = [share(square, analysis.weights.sum()) ** 0.5 for square in squares]
    return [
        f"{name} differs from the average by {distance:.0%} of the size of its weights: it may be no"
        " relative of the others, and the average of such networks makes noise"
        for name, distance in zip(names, distances, strict=True)
        if distance > _FAR
    ]
