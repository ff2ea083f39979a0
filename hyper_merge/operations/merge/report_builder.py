"""Gathers a merge's figures: losses, baselines, similarity, groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyper_merge.analysis.loss_weights import relative_weights
from hyper_merge.analysis.store import Analysis
from hyper_merge.decomposition.bounds import (
    best_private_losses,
    budget_bound,
    lower_bound,
    private_losses,
)
from hyper_merge.decomposition.clustering import find_clusters
from hyper_merge.decomposition.contrasts import to_deviations_matrix
from hyper_merge.decomposition.linalg import share
from hyper_merge.runs.report import PARTS, CheckpointReport, Report, part_losses
from hyper_merge.solver.batching import Ranks
from hyper_merge.solver.evaluation import Evaluation
from hyper_merge.solver.rank_pruning import Allowance


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
    found: Evaluation,
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
    groups = find_clusters(gram)
    weights = relative_weights(analysis.weights, analysis.layers)
    everything = total + float(sum(part.sum() for part in outside.values()))
    return Report(
        name=names[0],
        loras=tuple(names[1]),
        checkpoints=_rows(analysis, found, names[2]),
        method=solved[0],
        losses=tuple(solved[1]),
        loss=found.loss,
        private_loss=share(private.sum(), total),
        bound=bound,
        not_carried={kind: share(part.sum(), everything) for kind, part in outside.items()},
        bytes_before=sizes.before,
        bytes_average=sizes.average,
        bytes_loras=sizes.loras,
        curve=_rows_of(found.curve),
        similarity=_rows_of(_similarity(gram)),
        groups=groups.groups if groups.are_apart else (),
        between_groups=groups.between,
        parts=part_losses(analysis.layers, found.energies, found.errors),
        relative_loss=share(
            weights @ found.errors.sum(1),
            weights @ found.energies.sum(1),
        ),
    )


def gram_of(analysis: Analysis) -> Tensor:  # (k, k)
    """Inner products of the deviations in all layers together."""
    rows = to_deviations_matrix(analysis.contrasts)
    return rows @ analysis.grams.sum(0) @ rows.mT


def _limits(
    analysis: Analysis,
    found: Evaluation,
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
    costs, budget = allowance.costs, allowance.budget
    private = best_private_losses(spectra, found.energies, costs, budget)
    return private, budget_bound(spectra, of_layers, costs, budget, len(ranks[0]), grams)


def _rows(
    analysis: Analysis, found: Evaluation, names: Sequence[str]
) -> tuple[CheckpointReport, ...]:
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
            not_carried=share(outside[c], layers[c] + outside[c]),
            multipliers=tuple(found.multipliers["unet"][c].tolist()),
            text_multipliers=tuple(text[c].tolist()) if text is not None else (),
        )
        for c, (name, explained) in enumerate(zip(names, found.explained().tolist(), strict=True))
    )


def _similarity(gram: Tensor) -> Tensor:  # (k, k)
    """Cosines of the deviations; 0 for a checkpoint that has none."""
    norms = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).rsqrt()
    return (gram * norms * norms[:, None]).clamp(-1, 1).fill_diagonal_(1)


def _rows_of(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())
