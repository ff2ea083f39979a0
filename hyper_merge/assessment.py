"""From blocks as they are written to a merge's report: multipliers, losses, baselines, similarity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyper_merge.analysis_file import Analysis
from hyper_merge.checkpoints.layers import Layer
from hyper_merge.decomposition.bounds import (
    best_private_losses,
    budget_bound,
    lower_bound,
    private_losses,
)
from hyper_merge.decomposition.clusters import clusters
from hyper_merge.decomposition.contrasts import distances, energies
from hyper_merge.decomposition.ll1 import Statistics, fit_multipliers
from hyper_merge.pruning import Allowance
from hyper_merge.report import PARTS, CheckpointReport, PartLoss, Report
from hyper_merge.rounding import Rounded
from hyper_merge.solution import Ranks
from hyper_merge.weighting import relative_weights


@dataclass(frozen=True, eq=False)
class Fit:
    """Multipliers for blocks as written, and what they leave unexplained."""

    multipliers: Mapping[str, Tensor]  # by the layers' part: (k, R), float64
    errors: Tensor  # (layers, k), float64: squared norms of what is left
    energies: Tensor  # (layers, k), float64: squared norms of the deviations
    curve: Tensor  # (R + 1, k), float64: explained shares with the first 0, 1, ..., R blocks

    @property
    def loss(self) -> float:
        """Fraction of all deviations' energy that is not explained; 0 where there is none."""
        return _share(self.errors.sum(), self.energies.sum())

    def explained(self, layers: Tensor | None = None) -> Tensor:  # (k,)
        """Explained share by checkpoint, in chosen layers (a mask) or in all."""
        errors, of = (
            part if layers is None else part[layers] for part in (self.errors, self.energies)
        )
        left = torch.stack(
            [torch.tensor(_share(e, o)) for e, o in zip(errors.sum(0), of.sum(0), strict=True)]
        )
        return 1 - left


def fit(
    analysis: Analysis,
    blocks: Rounded,
    groups: Mapping[str, Sequence[int]],
    weights: Tensor,  # (layers,)
) -> Fit:
    """The best multipliers for the blocks as they are written, and the exact loss with them.

    Args:
        analysis: of the checkpoints.
        blocks: as the files hold them.
        groups: the layers that share one set of multipliers, by the names of their parts.
        weights: how much the layers' squared errors count.
    """
    of = energies(analysis.grams, analysis.contrasts)
    cross = distances(analysis.contrasts) @ blocks.cross  # (layers, k, R)
    errors, curve = torch.empty_like(of), torch.zeros(cross.shape[2] + 1, cross.shape[1]).double()
    multipliers = {}
    for name, members in groups.items():
        inside = list(members)
        inner, gram = cross[inside], blocks.gram[inside]
        plain = Statistics(float(of[inside].sum()), inner.sum(0), gram.sum(0))
        scale = weights[inside][:, None, None]
        weighted = Statistics(plain.energy, (scale * inner).sum(0), (scale * gram).sum(0))
        found = fit_multipliers(weighted)
        squares = torch.einsum("kr,lrs,ks->lk", found, gram, found)
        errors[inside] = of[inside] - 2 * (inner * found).sum(2) + squares
        curve += _explained_energies(plain, weighted)
        multipliers[name] = found
    shares = torch.where(of.sum(0) > 0, curve / of.sum(0), 1.0).clamp(0, 1)
    shares[0] = 0.0
    return Fit(multipliers, errors.clamp(min=0), of, shares)


@dataclass(frozen=True)
class BlockChoice:
    """The ranks as they are written, and what else they could have been."""

    ranks: Ranks
    allowance: Allowance | None  # to be spread over the layers; None for even ranks
    groups: Mapping[str, Sequence[int]]  # the layers that share multipliers


@dataclass(frozen=True)
class Sizes:
    """Bytes of files."""

    before: int
    average: int
    loras: int


def make_report(
    analysis: Analysis,
    found: Fit,
    blocks: BlockChoice,
    names: tuple[str, Sequence[str], Sequence[str]],  # of the run, its LoRAs, the checkpoints
    solved: tuple[str, Sequence[float]],  # method, losses by sweep
    sizes: Sizes,
) -> Report:
    """Gathers all figures of a merge."""
    total = float(found.energies.sum())
    private, bound = _limits(analysis, found, blocks)
    outside = analysis.not_carried
    gram = gram_of(analysis)
    groups = clusters(gram)
    weights = relative_weights(analysis.weights, analysis.layers)
    everything = total + float(sum(part.sum() for part in outside.values()))
    return Report(
        name=names[0],
        loras=tuple(names[1]),
        checkpoints=_rows(analysis, found, names[2]),
        method=solved[0],
        losses=tuple(solved[1]),
        loss=found.loss,
        private_loss=_share(private.sum(), total),
        bound=bound,
        not_carried={kind: _share(part.sum(), everything) for kind, part in outside.items()},
        bytes_before=sizes.before,
        bytes_average=sizes.average,
        bytes_loras=sizes.loras,
        curve=_rows_of(found.curve),
        similarity=_rows_of(_similarity(gram)),
        groups=groups.groups if groups.are_apart else (),
        between_groups=groups.between,
        parts=part_losses(analysis.layers, found.energies, found.errors),
        relative_loss=_share(
            weights @ found.errors.sum(1),
            weights @ found.energies.sum(1),
        ),
    )


def part_losses(
    layers: Sequence[Layer],
    energies: Tensor,  # (layers, ...): squared norms of the deviations
    errors: Tensor,  # the same of what is left
) -> tuple[PartLoss, ...]:
    """Sums over the layers of each section, in the order in which the sections begin."""
    total = energies.sum()
    groups: dict[tuple[str, str], list[int]] = {}
    for index, layer in enumerate(layers):
        groups.setdefault((layer.section, layer.part), []).append(index)
    return tuple(
        PartLoss(
            name=name,
            which=which,
            energy=_share(energies[inside].sum(), total),
            lost=_share(errors[inside].sum(), total),
        )
        for (name, which), inside in groups.items()
    )


def gram_of(analysis: Analysis) -> Tensor:  # (k, k)
    """Inner products of the deviations in all layers together."""
    rows = distances(analysis.contrasts)
    return rows @ analysis.grams.sum(0) @ rows.mT


def _limits(
    analysis: Analysis,
    found: Fit,
    blocks: BlockChoice,
) -> tuple[Tensor, float]:
    """What private LoRAs of the same bytes leave of each checkpoint, and a bound of the loss."""
    ranks, allowance = blocks.ranks, blocks.allowance
    spectra, of_layers = analysis.spectra, found.energies.sum(1).tolist()
    slices = analysis.grams[:, :-1, :-1]
    grams = [slices[list(members)].sum(0) for members in blocks.groups.values()]
    if allowance is None:
        private = private_losses(spectra, found.energies, ranks)
        return private, lower_bound(spectra, of_layers, ranks, grams)
    prices = allowance.costs, allowance.budget
    private = best_private_losses(spectra, found.energies, *prices)
    return private, budget_bound(spectra, of_layers, prices, len(ranks[0]), grams)


def _rows(analysis: Analysis, found: Fit, names: Sequence[str]) -> tuple[CheckpointReport, ...]:
    parts = [layer.part for layer in analysis.layers]
    unet, encoder = (
        found.explained(torch.tensor([part == which for part in parts])).tolist() for which in PARTS
    )
    text = found.multipliers.get("text_encoder")
    layers = found.energies.sum(0)
    outside = torch.stack(list(analysis.not_carried.values())).sum(0)
    return tuple(
        CheckpointReport(
            name=name,
            explained=explained,
            explained_unet=unet[c],
            explained_text_encoder=encoder[c],
            error=max(1 - explained, 0.0) ** 0.5,
            not_carried=_share(outside[c], layers[c] + outside[c]),
            multipliers=tuple(found.multipliers["unet"][c].tolist()),
            text_multipliers=tuple(text[c].tolist()) if text is not None else (),
        )
        for c, (name, explained) in enumerate(zip(names, found.explained().tolist(), strict=True))
    )


def _explained_energies(
    plain: Statistics,  # of the blocks as written, over the layers of one group
    weighted: Statistics,
) -> Tensor:  # (R + 1, k)
    """What the first blocks explain of every checkpoint, the multipliers fitted for those."""
    rows = [plain.cross.new_zeros(len(plain.cross))]
    for count in range(1, len(plain.gram) + 1):
        fitted = Statistics(
            weighted.energy, weighted.cross[:, :count], weighted.gram[:count, :count]
        )
        found = fit_multipliers(fitted)
        rows.append(
            (found * (2 * plain.cross[:, :count] - found @ plain.gram[:count, :count])).sum(1)
        )
    return torch.stack(rows)


def _similarity(gram: Tensor) -> Tensor:  # (k, k)
    """Cosines of the deviations; 0 for a checkpoint that has none."""
    norms = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).rsqrt()
    return (gram * norms * norms[:, None]).clamp(-1, 1).fill_diagonal_(1)


def _rows_of(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())


def _share(part: Tensor | float, whole: Tensor | float) -> float:
    return float(part) / float(whole) if float(whole) > 0 else 0.0
