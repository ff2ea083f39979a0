"""Limits of the loss: spectra of the cores, a lower bound, private LoRAs of the same bytes.

All figures are squared norms ("energies"), from the cores; what lies outside of the bases counts as
not explained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hyper_merge.decomposition.linalg import eigenvalues, moved
from hyper_merge.decomposition.rank_allocation import maximize_gain, spread_ranks


@dataclass(frozen=True, eq=False)
class Spectra:
    """Squared singular values of one layer, falling."""

    rows: Tensor  # (p,), of the unfolding of all slices along the rows
    columns: Tensor  # (q,), along the columns
    private: Tensor  # (k, min(p, q)), of every checkpoint's deviation

    def scaled(self, factor: float) -> Spectra:
        """Returns the spectra of the layer times the factor's root."""
        return Spectra(self.rows * factor, self.columns * factor, self.private * factor)

    @cached_property
    def gains(self) -> Tensor:  # (max(p, q),), falling
        """The most that each further rank can add to the explained energy.

        A stack of slices whose sum of ranks is rho has at most rank rho in both unfoldings, so it
        explains no more than the rho largest squared singular values of either. The smaller of two
        concave sums is concave: these gains fall.
        """
        size = max(len(self.rows), len(self.columns))
        sums = [
            torch.nn.functional.pad(part.cumsum(0), (0, size - len(part)), value=float(part.sum()))
            for part in (self.rows, self.columns)
        ]
        return torch.minimum(*sums).diff(prepend=torch.zeros(1, dtype=torch.float64)).clamp(min=0)

    def promises(self, dimensions: int) -> Tensor:  # (d * min(p, q),), falling
        """Returns what each further rank can be expected to add to the explained energy.

        Private LoRAs of k checkpoints take k / d times the ranks that blocks along the d directions
        of their deviations take; exactly so for two checkpoints.

        Args:
            dimensions: d, of the deviations.
        """
        values = self.private.flatten().sort(descending=True).values
        sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
        places = torch.arange(len(values) * dimensions // len(self.private) + 1).double()
        places *= len(self.private) / dimensions
        below = places.long()
        above = (below + 1).clamp(max=len(values))
        return torch.lerp(sums[below], sums[above], places - below).diff()


def compute_spectra(
    core: Tensor,  # (d, p, q)
    to_deviations: Tensor,  # (k, d)
) -> Spectra:
    """Computes squared singular values through Gram matrices, for only their sums matter here."""
    return Spectra(
        rows=_squared_singular_values((core @ core.mT).sum(0)),
        columns=_squared_singular_values((core.mT @ core).sum(0)),
        private=_private_spectra(core, to_deviations),
    )


def leading_spectra(
    core: Tensor,  # (d, p, q)
    to_deviations: Tensor,  # (k, d)
    shape: tuple[int, int],
) -> Spectra:
    """Computes spectra in a fraction of the time of `compute_spectra`.

    Both unfoldings have the spectrum of the narrower one, which is a limit as well, if a looser one;
    private deviations are looked at between the first columns of the bases.

    Args:
        core: between its bases.
        to_deviations: from slices to deviations.
        shape: the part of the core with the private deviations.
    """
    wide = core.mT if core.shape[1] > core.shape[2] else core
    unfolded = _squared_singular_values((wide @ wide.mT).sum(0))
    private = _private_spectra(core[:, : shape[0], : shape[1]], to_deviations)
    return Spectra(rows=unfolded, columns=unfolded, private=private)


def lower_bound(
    layers: Sequence[Spectra],
    energies: Sequence[float],  # of every layer, in and outside of its bases
    ranks: Sequence[tuple[int, ...]],  # of the blocks, per layer
    grams: Sequence[Tensor],  # (d, d) each, of the slices over the layers of one group
) -> float:
    """Returns a loss (fraction of all energy) that no shared LoRAs of these ranks can go below.

    With rho = sum of its ranks, a layer's approximation has at most rank rho in every unfolding of
    the stack; and over the layers that share multipliers at most R dimensions along the checkpoints.
    """
    explained = sum(
        float(layer.gains[: sum(rank)].sum()) for layer, rank in zip(layers, ranks, strict=True)
    )
    return _at_least(explained, energies, grams, max(map(len, ranks), default=0))


def budget_bound(
    layers: Sequence[Spectra],
    energies: Sequence[float],  # of every layer, in and outside of its bases
    costs: Sequence[float],  # of a rank, per layer
    budget: float,
    blocks: int,
    grams: Sequence[Tensor],  # (d, d) each, of the slices over the layers of one group
) -> float:
    """Returns a loss (fraction of all energy) that no shared LoRAs within a budget can go below.

    It is the `lower_bound` of the best ranks that the budget allows.
    """
    return _at_least(
        maximize_gain([s.gains for s in layers], costs, budget), energies, grams, blocks
    )


def even_private_ranks(
    layers: Sequence[Spectra],
    ranks: Sequence[tuple[int, ...]],  # of the shared blocks, per layer
) -> list[list[int]]:  # per layer and checkpoint
    """Returns the ranks of private LoRAs of the same bytes, layer by layer.

    A layer's rho ranks are dealt out evenly; what does not divide goes to those that gain most.
    """
    counts = []
    for layer, rank in zip(layers, ranks, strict=True):
        even, rest = divmod(sum(rank), len(layer.private))
        counts.append([even] * len(layer.private))
        if rest and even < layer.private.shape[1]:
            for checkpoint in layer.private[:, even].topk(rest).indices.tolist():
                counts[-1][checkpoint] += 1
    return counts


def best_private_ranks(
    layers: Sequence[Spectra],
    costs: Sequence[float],  # of a rank, per layer
    budget: float,
) -> list[list[int]]:  # per layer and checkpoint
    """Returns the ranks of private LoRAs that lie where they explain most."""
    k = len(layers[0].private)
    counts = spread_ranks(
        [values for layer in layers for values in layer.private],
        [cost for cost in costs for _ in range(k)],
        budget,
    )
    return [counts[start : start + k] for start in range(0, len(counts), k)]


def private_errors(
    layers: Sequence[Spectra],
    energies: Tensor,  # (layers, k), of every checkpoint's deviation
    ranks: Sequence[Sequence[int]],  # per layer and checkpoint
) -> Tensor:  # (k,), squared errors
    """Returns what stays unexplained of every checkpoint by private LoRAs of these ranks."""
    errors = energies.sum(0)
    for layer, counts in zip(layers, ranks, strict=True):
        kept = [values[:count].sum() for values, count in zip(layer.private, counts, strict=True)]
        errors = errors - torch.stack(kept)
    return errors.clamp(min=0)


def _at_least(
    explained: float, energies: Sequence[float], grams: Sequence[Tensor], blocks: int
) -> float:
    total = float(sum(energies))
    if total <= 0:
        return 0.0
    along_checkpoints = sum(float(_squared_singular_values(gram)[blocks:].sum()) for gram in grams)
    return max(total - explained, along_checkpoints, 0.0) / total


def _private_spectra(
    core: Tensor,  # (d, p, q)
    to_deviations: Tensor,  # (k, d)
) -> Tensor:  # (k, min(p, q))
    deviations = (moved(to_deviations.to(core.dtype), core.device) @ core.flatten(1)).view(
        -1, *core.shape[1:]
    )
    deviations = deviations.mT if core.shape[1] > core.shape[2] else deviations
    return _squared_singular_values(deviations @ deviations.mT)


def _squared_singular_values(gram: Tensor) -> Tensor:  # float64, CPU, falling
    return eigenvalues(gram).flip(-1).clamp(min=0).double()
