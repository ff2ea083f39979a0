"""Tells whether checkpoints fall into unlike groups, which one average serves badly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Final

import torch
from torch import Tensor

_RELATED: Final = 0.03  # cosine from which inputs may have something to share
_CLEAR: Final = 4.0  # of Calinski and Harabasz' index, which is about 1 where nothing is grouped


@dataclass(frozen=True)
class Clusters:
    """Groups of checkpoints; one group of all where there are no unlike ones."""

    groups: tuple[tuple[int, ...], ...]  # places of checkpoints, in rising order
    between: float  # share 0..1 of all differences that an average for each group takes away

    @property
    def are_apart(self) -> bool:
        """Tells whether there is more than one group."""
        return len(self.groups) > 1


def find_clusters(
    gram: Tensor,  # (k, k), inner products of the deviations from any one base
) -> Clusters:
    """Finds groups by Ward's method, as many as stand out most clearly.

    Two groupings are compared by the ratio of what lies between groups to what lies within, each per
    degree of freedom; unrelated checkpoints give about 1 whatever the number of groups.

    Source: Ward, "Hierarchical grouping to optimize an objective function", 1963; Calinski and
    Harabasz, "A dendrite method for cluster analysis", 1974.
    """
    k = len(gram)
    everything = (tuple(range(k)),)
    total = _within(gram, everything)
    best: tuple[tuple[int, ...], ...] = everything
    clearest, share = _CLEAR, 0.0
    for groups in _mergers(gram):
        count = len(groups)
        within = _within(gram, groups)
        if not 1 < count <= k // 2 or total <= 0:  # more would hardly be groups
            continue
        between = (total - within) / (count - 1)
        index = between / max(within / (k - count), 1e-12 * total)
        if index > clearest:
            best, clearest, share = groups, index, 1 - within / total
    return Clusters(best, share)


def find_relatives(
    *grams: Tensor,  # (k, k), inner products of the deviations, of one or several parts of them
) -> list[list[int]]:
    """Returns groups of inputs that are related to each other in any part, directly or through others.

    Inputs of different groups have next to nothing in common.
    """
    related = torch.zeros_like(grams[0], dtype=torch.bool)
    for gram in grams:
        norms = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).rsqrt()
        related |= (gram * norms * norms[:, None]).abs() > _RELATED
    groups: list[list[int]] = []
    left = set(range(len(related)))
    while left:
        group, new = set[int](), {min(left)}
        while new:
            group |= new
            new = {i for c in new for i in related[c].nonzero().flatten().tolist()} - group
        left -= group
        groups.append(sorted(group))
    return groups


def _mergers(gram: Tensor) -> list[tuple[tuple[int, ...], ...]]:
    """Returns the steps from single checkpoints to two groups; each joins the two nearest ones."""
    groups: list[tuple[int, ...]] = [(c,) for c in range(len(gram))]
    steps = []

    @cache
    def spread(group: tuple[int, ...]) -> float:
        return _spread(gram, group)

    @cache
    def growth(one: tuple[int, ...], other: tuple[int, ...]) -> float:
        return spread(one + other) - sum(map(spread, (one, other)))

    while len(groups) > 2:
        one, other = min(
            combinations(groups, 2),
            key=lambda pair: growth(*pair),
        )
        groups = [group for group in groups if group not in (one, other)]
        groups.append(tuple(sorted(one + other)))
        steps.append(tuple(sorted(groups)))
    return steps


def _within(gram: Tensor, groups: tuple[tuple[int, ...], ...]) -> float:
    return sum(_spread(gram, group) for group in groups)


def _spread(gram: Tensor, group: tuple[int, ...]) -> float:
    """Returns the sum of squared distances of a group's members from their mean."""
    part = gram[list(group)][:, list(group)]
    return max(float(part.diagonal().sum() - part.mean(dim=0).sum()), 0.0)
