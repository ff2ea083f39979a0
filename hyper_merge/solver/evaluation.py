"""Fits the best multipliers to blocks as they are written, and measures what stays unexplained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyper_merge.decomposition.contrasts import energies, to_deviations_matrix
from hyper_merge.decomposition.linalg import share
from hyper_merge.decomposition.ll1 import Statistics, fit_multipliers
from hyper_merge.solver.metric import Metric
from hyper_merge.solver.products import StoredFactors


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The best multipliers for blocks as written, with the errors and energies of all layers."""

    multipliers: Mapping[str, Tensor]  # by the layers' part: (k, R), float64
    errors: Tensor  # (layers, k), float64: squared norms of what is left
    energies: Tensor  # (layers, k), float64: squared norms of the deviations
    weighted_errors: Tensor  # (layers, k), float64: `errors` as the loss counts them
    weighted_energies: Tensor  # (layers, k), float64: `energies` as the loss counts them
    curve: Tensor  # (R + 1, k), float64: explained shares with the first 0, 1, ..., R blocks
    shared: Tensor  # (k,), float64: `fidelity` by these blocks alone

    @property
    def loss(self) -> float:
        """Fraction of all deviations' energy that is not explained; 0 where there is none."""
        return share(self.errors.sum(), self.energies.sum())

    @property
    def weighted_loss(self) -> float:
        """The same, as the loss counts squared errors."""
        return share(self.weighted_errors.sum(), self.weighted_energies.sum())

    @property
    def fidelity(self) -> Tensor:  # (k,), float64
        """Explained share by checkpoint, as the loss counts squared errors."""
        return _explained(self.weighted_errors, self.weighted_energies)

    def explained(self, layers: Tensor | None = None) -> Tensor:  # (k,), float64
        """Returns the explained share by checkpoint, in chosen layers (a mask) or in all."""
        chosen = slice(None) if layers is None else layers
        return _explained(self.errors[chosen], self.energies[chosen])


def evaluate(
    metric: Metric,
    blocks: StoredFactors,
    groups: Mapping[str, Sequence[int]],
    multipliers: Mapping[str, Tensor] | None = None,
) -> Evaluation:
    """Returns the best multipliers for the blocks as they are written, and their exact loss.

    Args:
        metric: of the loss.
        blocks: as the files hold them.
        groups: the layers that share one set of multipliers, by the names of their parts.
        multipliers: by group: (k, R), float64, in place of the best ones.
    """
    contrasts = metric.analysis.contrasts
    deviations = energies(metric.analysis.grams, contrasts)
    weighted_deviations = metric.energies
    rows = to_deviations_matrix(contrasts)
    plain, weighted = blocks.plain.of(rows), blocks.weighted.of(rows)
    errors, weighted_errors = torch.empty_like(deviations), torch.empty_like(deviations)
    curve = torch.zeros(plain.cross.shape[2] + 1, plain.cross.shape[1]).double()
    chosen = {}
    for name, members in groups.items():
        inside = list(members)
        statistics = [
            products.statistics(inside, float(energy[inside].sum()))
            for products, energy in ((plain, deviations), (weighted, weighted_deviations))
        ]
        fitted = multipliers[name] if multipliers else fit_multipliers(statistics[1])
        errors[inside] = plain.errors(inside, deviations, fitted)
        weighted_errors[inside] = weighted.errors(inside, weighted_deviations, fitted)
        curve += _explained_energies(*statistics)
        chosen[name] = fitted
    total = deviations.sum(0)
    shares = torch.where(total > 0, curve / total, 1.0).clamp(0, 1)
    shares[0] = 0.0
    return Evaluation(
        chosen,
        errors,
        deviations,
        weighted_errors,
        weighted_deviations,
        shares,
        _explained(weighted_errors, weighted_deviations),
    )


def _explained(
    errors: Tensor,  # (layers, k), squared norms
    energies: Tensor,  # (layers, k)
) -> Tensor:  # (k,)
    total = energies.sum(0)
    return 1 - torch.where(total > 0, errors.sum(0) / total, 0.0)


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
