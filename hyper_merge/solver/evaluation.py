"""Fits the best multipliers to blocks as they are written, and measures what stays unexplained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyper_merge.analysis.store import Analysis
from hyper_merge.decomposition.contrasts import energies, to_deviations_matrix
from hyper_merge.decomposition.linalg import share
from hyper_merge.decomposition.ll1 import Statistics, fit_multipliers
from hyper_merge.solver.quantization import StoredFactors


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The best multipliers for blocks as written, with the errors and energies of all layers."""

    multipliers: Mapping[str, Tensor]  # by the layers' part: (k, R), float64
    errors: Tensor  # (layers, k), float64: squared norms of what is left
    energies: Tensor  # (layers, k), float64: squared norms of the deviations
    curve: Tensor  # (R + 1, k), float64: explained shares with the first 0, 1, ..., R blocks
    weights: Tensor  # (layers,), float64: how much squared errors count
    shared: Tensor  # (k,), float64: `fidelity` by these blocks alone

    @property
    def loss(self) -> float:
        """Fraction of all deviations' energy that is not explained; 0 where there is none."""
        return share(self.errors.sum(), self.energies.sum())

    @property
    def weighted_loss(self) -> float:
        """The same, with the weights of the layers."""
        return share((self.weights @ self.errors).sum(), (self.weights @ self.energies).sum())

    @property
    def fidelity(self) -> Tensor:  # (k,), float64
        """Explained share by checkpoint, as the loss counts squared errors."""
        return _explained(self.errors, self.energies, self.weights)

    def explained(self, layers: Tensor | None = None) -> Tensor:  # (k,), float64
        """Returns the explained share by checkpoint, in chosen layers (a mask) or in all."""
        weights = torch.ones_like(self.weights) if layers is None else layers.to(self.weights)
        return _explained(self.errors, self.energies, weights)


def evaluate(
    analysis: Analysis,
    blocks: StoredFactors,
    groups: Mapping[str, Sequence[int]],
    weights: Tensor,  # (layers,)
) -> Evaluation:
    """Returns the best multipliers for the blocks as they are written, and their exact loss.

    Args:
        analysis: of the checkpoints.
        blocks: as the files hold them.
        groups: the layers that share one set of multipliers, by the names of their parts.
        weights: how much the layers' squared errors count.
    """
    deviations = energies(analysis.grams, analysis.contrasts)
    cross = to_deviations_matrix(analysis.contrasts) @ blocks.cross  # (layers, k, R)
    errors = torch.empty_like(deviations)
    curve = torch.zeros(cross.shape[2] + 1, cross.shape[1]).double()
    multipliers = {}
    for name, members in groups.items():
        inside = list(members)
        inner, gram = cross[inside], blocks.gram[inside]
        plain = Statistics(float(deviations[inside].sum()), inner.sum(0), gram.sum(0))
        scale = weights[inside][:, None, None]
        weighted = Statistics(plain.energy, (scale * inner).sum(0), (scale * gram).sum(0))
        fitted = fit_multipliers(weighted)
        squares = torch.einsum("kr,lrs,ks->lk", fitted, gram, fitted)
        errors[inside] = deviations[inside] - 2 * (inner * fitted).sum(2) + squares
        curve += _explained_energies(plain, weighted)
        multipliers[name] = fitted
    total = deviations.sum(0)
    shares = torch.where(total > 0, curve / total, 1.0).clamp(0, 1)
    shares[0] = 0.0
    errors = errors.clamp(min=0)
    fidelity = _explained(errors, deviations, weights)
    return Evaluation(multipliers, errors, deviations, shares, weights, fidelity)


def _explained(
    errors: Tensor,  # (layers, k), squared norms
    energies: Tensor,  # (layers, k)
    weights: Tensor,  # (layers,)
) -> Tensor:  # (k,)
    total = weights @ energies
    return 1 - torch.where(total > 0, (weights @ errors) / total, 0.0)


def _explained_energies(
    plain: Statistics,  # of the blocks as written, over the layers of one group
    weighted: Statistics,
) -> Tensor:  # (R + 1, k)
    """Returns the energy that the first blocks explain, by checkpoint, with multipliers for them alone."""
    rows = [plain.cross.new_zeros(len(plain.cross))]
    for count in range(1, len(plain.gram) + 1):
        first = Statistics(
            weighted.energy, weighted.cross[:, :count], weighted.gram[:count, :count]
        )
        fitted = fit_multipliers(first)
        rows.append(
            (fitted * (2 * plain.cross[:, :count] - fitted @ plain.gram[:count, :count])).sum(1)
        )
    return torch.stack(rows)
