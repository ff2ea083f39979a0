"""Builds the report of a merge: losses, baselines, similarity, groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyper_merge.analysis.contents import Analysis
from hyper_merge.decomposition.bounds import (
    Spectra,
    best_private_ranks,
    budget_bound,
    even_private_ranks,
    lower_bound,
    private_errors,
)
from hyper_merge.decomposition.clustering import find_clusters
from hyper_merge.decomposition.contrasts import to_deviations_matrix
from hyper_merge.decomposition.linalg import share
from hyper_merge.operations.merge.solved_merge import SolvedMerge
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runs.report import PARTS, CheckpointReport, Report, part_losses
from hyper_merge.solver.metric import Metric


@dataclass(frozen=True)
class FileSizes:
    """Bytes of a merge's files."""

    before: int  # the checkpoints
    average: int
    loras: int


def make_report(
    metric: Metric,
    solved: SolvedMerge,
    run: str,
    loras: Sequence[str],
    checkpoints: Sequence[str],
    sizes: FileSizes,
) -> Report:
    """Returns all figures of a merge except those of companions and of host precision.

    Args:
        metric: of the loss.
        solved: the merge's solution.
        run: name of the run.
        loras: names of the shared LoRAs.
        checkpoints: names of the checkpoints.
        sizes: bytes of the files.
    """
    evaluation, analysis = solved.evaluation, metric.analysis
    total = float(evaluation.energies.sum())
    private_loss, bound = _find_limits(solved, metric)
    outside = analysis.not_carried
    rows = to_deviations_matrix(analysis.contrasts)
    gram = rows @ analysis.grams.sum(0) @ rows.mT
    clusters = find_clusters(metric.deviation_gram)
    everything = total + float(sum(part.sum() for part in outside.values()))
    return Report(
        name=run,
        loras=tuple(loras),
        checkpoints=_checkpoint_reports(analysis, solved, checkpoints),
        method=solved.plan.recipe.method,
        losses=tuple(solved.losses),
        loss=evaluation.loss,
        private_loss=private_loss if metric.counts_alike else None,
        bound=bound if metric.counts_alike else None,
        not_carried={kind: share(part.sum(), everything) for kind, part in outside.items()},
        bytes_before=sizes.before,
        bytes_average=sizes.average,
        bytes_loras=sizes.loras,
        curve=_nested_tuples(evaluation.curve),
        similarity=_nested_tuples(_similarity(gram)),
        groups=clusters.groups if clusters.are_apart else (),
        between_groups=clusters.between,
        parts=part_losses(analysis.layers, evaluation.energies, evaluation.errors),
        metric=_metric_word(analysis, solved.plan.recipe),
        weighted_loss=share(
            (evaluation.weighted_errors @ metric.checkpoints).sum(),
            (evaluation.weighted_energies @ metric.checkpoints).sum(),
        ),
        weighted_private_loss=private_loss,
        weighted_bound=bound,
        shared_fidelity=tuple(evaluation.shared.tolist()),
        training=solved.training,
    )


def _metric_word(analysis: Analysis, recipe: Recipe) -> str:
    """Returns how layers were weighed: "layout" too where the network could not be run."""
    by_layout = recipe.layer_weights == "output" and not analysis.sensitivities
    return "layout" if by_layout else recipe.layer_weights


def _find_limits(solved: SolvedMerge, metric: Metric) -> tuple[float, float]:
    """Returns what private LoRAs of the same bytes leave, and a bound, as shares of all energy.

    Both are as the loss counts squared errors.
    """
    energies = solved.evaluation.weighted_energies * metric.checkpoints
    private = private_errors(metric.spectra, energies, _private_ranks(metric.spectra, solved))
    bound = _bound(metric.spectra, energies, metric.slice_grams, solved)
    return share(private.sum(), energies.sum()), bound


def _private_ranks(spectra: Sequence[Spectra], solved: SolvedMerge) -> list[list[int]]:
    if solved.plan.allowance is None:
        return even_private_ranks(spectra, solved.all_ranks())
    return best_private_ranks(spectra, solved.plan.rank_bytes, solved.factor_bytes())


def _bound(
    spectra: Sequence[Spectra],
    energies: Tensor,  # (layers, k)
    grams: Tensor,  # (layers, d, d)
    solved: SolvedMerge,
) -> float:
    ranks, by_layer = solved.all_ranks(), energies.sum(1).tolist()
    by_group = [grams[list(members)].sum(0) for members in solved.plan.groups.values()]
    if solved.plan.allowance is None:
        return lower_bound(spectra, by_layer, ranks, by_group)
    costs, budget = solved.plan.rank_bytes, solved.factor_bytes()
    return budget_bound(spectra, by_layer, costs, budget, len(ranks[0]), by_group)


def _checkpoint_reports(
    analysis: Analysis, solved: SolvedMerge, names: Sequence[str]
) -> tuple[CheckpointReport, ...]:
    evaluation, weighted = solved.evaluation, solved.evaluation.fidelity.tolist()
    if solved.training is not None and not solved.private_loras:
        weighted = [1 - left for left in solved.training.after]
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
            explained_weighted=weighted[c],
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
