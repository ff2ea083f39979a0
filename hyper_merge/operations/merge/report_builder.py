"""Builds the report of a merge: losses, baselines, similarity, groups."""

from __future__ import annotations

from collections.abc import Sequence
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
from hyper_merge.operations.merge.solved_merge import SolvedMerge
from hyper_merge.runs.report import PARTS, CheckpointReport, Report, part_losses
from hyper_merge.solver.evaluation import Evaluation


@dataclass(frozen=True)
class FileSizes:
    """Bytes of a merge's files."""

    before: int  # the checkpoints
    average: int
    loras: int


def make_report(
    analysis: Analysis,
    solved: SolvedMerge,
    run: str,
    loras: Sequence[str],
    checkpoints: Sequence[str],
    sizes: FileSizes,
) -> Report:
    """Returns all figures of a merge except those of companions and of host precision.

    Args:
        analysis: the checkpoints' analysis.
        solved: the merge's solution.
        run: name of the run.
        loras: names of the shared LoRAs.
        checkpoints: names of the checkpoints.
        sizes: bytes of the files.
    """
    evaluation = solved.evaluation
    total = float(evaluation.energies.sum())
    private, bound = _limits(analysis, solved)
    outside = analysis.not_carried
    gram = gram_of(analysis)
    clusters = find_clusters(gram)
    weights = relative_weights(analysis.weights, analysis.layers)
    everything = total + float(sum(part.sum() for part in outside.values()))
    return Report(
        name=run,
        loras=tuple(loras),
        checkpoints=_checkpoint_reports(analysis, evaluation, checkpoints),
        method=solved.plan.recipe.method,
        losses=tuple(solved.losses),
        loss=evaluation.loss,
        private_loss=share(private.sum(), total),
        bound=bound,
        not_carried={kind: share(part.sum(), everything) for kind, part in outside.items()},
        bytes_before=sizes.before,
        bytes_average=sizes.average,
        bytes_loras=sizes.loras,
        curve=_nested_tuples(evaluation.curve),
        similarity=_nested_tuples(_similarity(gram)),
        groups=clusters.groups if clusters.are_apart else (),
        between_groups=clusters.between,
        parts=part_losses(analysis.layers, evaluation.energies, evaluation.errors),
        relative_loss=share(
            weights @ evaluation.errors.sum(1),
            weights @ evaluation.energies.sum(1),
        ),
    )


def gram_of(analysis: Analysis) -> Tensor:  # (k, k)
    """Returns the inner products of the checkpoints' deviations in all layers together."""
    rows = to_deviations_matrix(analysis.contrasts)
    return rows @ analysis.grams.sum(0) @ rows.mT


def _limits(analysis: Analysis, solved: SolvedMerge) -> tuple[Tensor, float]:
    """Returns the energy of each checkpoint that private LoRAs of the same bytes leave, and a bound."""
    ranks, allowance = solved.all_ranks(), solved.whole_allowance()
    energies = solved.evaluation.energies
    spectra, layer_energies = analysis.spectra, energies.sum(1).tolist()
    slices = analysis.grams[:, :-1, :-1]
    grams = [slices[list(members)].sum(0) for members in solved.plan.groups.values()]
    if allowance is None:
        private = private_losses(spectra, energies, ranks)
        return private, lower_bound(spectra, layer_energies, ranks, grams)
    costs, budget = allowance.costs, allowance.budget
    private = best_private_losses(spectra, energies, costs, budget)
    return private, budget_bound(spectra, layer_energies, costs, budget, len(ranks[0]), grams)


def _checkpoint_reports(
    analysis: Analysis, evaluation: Evaluation, names: Sequence[str]
) -> tuple[CheckpointReport, ...]:
    layer_parts = [layer.part for layer in analysis.layers]
    unet, encoder = (
        evaluation.explained(torch.tensor([layer == part for layer in layer_parts])).tolist()
        for part in PARTS
    )
    text = evaluation.multipliers.get("text_encoder")
    layers = evaluation.energies.sum(0)
    outside = torch.stack(list(analysis.not_carried.values())).sum(0)
    return tuple(
        CheckpointReport(
            name=name,
            explained=explained,
            explained_unet=unet[c],
            explained_text_encoder=encoder[c],
            error=max(1 - explained, 0.0) ** 0.5,
            not_carried=share(outside[c], layers[c] + outside[c]),
            multipliers=tuple(evaluation.multipliers["unet"][c].tolist()),
            text_multipliers=tuple(text[c].tolist()) if text is not None else (),
        )
        for c, (name, explained) in enumerate(
            zip(names, evaluation.explained().tolist(), strict=True)
        )
    )


def _similarity(gram: Tensor) -> Tensor:  # (k, k)
    """Returns the cosines of the deviations; 0 for a checkpoint that has none."""
    norms = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).rsqrt()
    return (gram * norms * norms[:, None]).clamp(-1, 1).fill_diagonal_(1)


def _nested_tuples(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())
