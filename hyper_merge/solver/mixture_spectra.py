"""Computes the singular values of all mixtures of deviations, by which ranks are forecast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

from hyper_merge.decomposition.clustering import find_relatives
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.metric import Metric
from hyper_merge.solver.rank_forecast import RankForecast

_PHASE: Final = "forecasting what LoRAs explain"
_SAMPLE: Final = 8  # layers that stand for all where inputs are many


def forecast_ranks(
    metric: Metric,
    groups: Mapping[str, Sequence[int]],
    names: Sequence[str],
    costs: Sequence[int],
    progress: Progress,
) -> RankForecast:
    """Computes the spectra of all mixtures, which takes seconds for four SD 1.x files.

    Args:
        metric: of the loss; here checkpoints count alike.
        groups: the layers that share multipliers.
        names: of the checkpoints.
        costs: bytes of a rank, per layer.
        progress: progress and interrupt.
    """
    metric = metric.unweighted
    many = metric.analysis.has_many
    layers: Sequence[int] = range(len(metric.layers))
    if many:
        layers = sorted(metric.representatives(layers, _SAMPLE))
    rotations = _rotations(metric, groups, of_relatives=many)
    mixtures: list[tuple[Tensor, ...]] = []

    values_of = partial(_squared_values, metric)
    with metric.analysis.maps(torch.device("cpu"), progress.check, _PHASE) as maps:
        for values in maps.layers(values_of, layers, [rotations[index] for index in layers]):
            mixtures.append(values)
            progress.report(_PHASE, len(mixtures) / len(layers))
    basis = metric.to_deviations
    times = sum(costs) / sum(costs[index] for index in layers)
    return RankForecast(
        names=tuple(names),
        mixtures=tuple(mixtures),
        private=tuple(tuple(metric.spectra[index].private) for index in layers),
        multipliers=tuple(basis @ rotations[index] for index in layers),
        energies=metric.energies[list(layers)].sum(0),
        costs=tuple(round(times * costs[index]) for index in layers),
        sampled=tuple(layers),
    )


def _rotations(
    metric: Metric, groups: Mapping[str, Sequence[int]], *, of_relatives: bool
) -> list[Tensor]:
    """Returns each layer's (d, d) eigenvectors of its group's weighted Gram matrix, largest first.

    Those of relatives alone do not mix what has nothing in common.
    """
    slices = metric.slice_grams
    rotations: dict[int, Tensor] = {}
    for members in groups.values():
        gram = slices[list(members)].sum(0)
        vectors = _eigenvectors(gram, find_relatives(gram) if of_relatives else [range(len(gram))])
        rotations.update(dict.fromkeys(members, vectors))
    return [rotations[index] for index in range(len(slices))]


def _eigenvectors(gram: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:  # (d, d)
    """Returns the eigenvectors of the groups' parts of a Gram matrix, those of all by their values."""
    values, vectors = torch.zeros(len(gram)).double(), torch.zeros_like(gram)
    for group in map(list, groups):
        at = torch.tensor(group)
        values[at], vectors[at[:, None], at] = torch.linalg.eigh(gram[at][:, at])
    return vectors[:, values.argsort(descending=True)]


def _squared_values(metric: Metric, index: int, rotation: Tensor) -> tuple[Tensor, ...]:
    """Returns the squared singular values of every mixture of a layer's slices, falling."""
    core = metric.core(index)
    mixed = (rotation.mT.to(core) @ core.flatten(1)).view_as(core)
    mixed = mixed.mT if core.shape[1] > core.shape[2] else mixed
    values = torch.linalg.eigvalsh(mixed @ mixed.mT).flip(-1).clamp(min=0).double()
    return tuple(values)
