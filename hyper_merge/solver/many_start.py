"""Starts the solve for many inputs of low rank in closed form: what relatives share, then what each has alone.

Inputs fall into groups of relatives by the cosines of their deviations. Of n relatives come n blocks: some along
the leading eigenvectors of their Gram matrix, each the truncated SVD of its mixture of inputs; the others
are what single inputs have besides. How many of which kind is chosen by what is explained for its bytes
in a sample of the layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hyper_merge.decomposition.factored import singular_components
from hyper_merge.decomposition.linalg import orthonormal, random_normal
from hyper_merge.solver.products import FactorPair

_PER_RANK: Final = 3  # of a block's mean rank: the most that a mixture has in a layer
_LEAST, _MOST = 8, 64  # of that
_TURNS: Final = 2  # of subspace iteration


@dataclass(frozen=True, eq=False)
class Components:
    """One layer's inputs as components `ups[:, s] @ downs[s]`, as the loss counts them."""

    ups: Tensor  # (p, S)
    downs: Tensor  # (S, q)
    owners: Tensor  # (S,), the input of each; those of an input side by side, falling


@dataclass(frozen=True)
class StartBlock:
    """A block along a direction of inputs, or what a single input has besides the mixtures."""

    direction: tuple[float, ...]  # (k,), of length 1
    is_mixture: bool


def relatives_blocks(
    gram: Tensor,  # (k, k), float64
    relatives: Sequence[int],
    mixtures: int,
) -> list[StartBlock]:
    """Returns the blocks of relatives: the leading mixtures, and the inputs of which these leave most."""
    inside = gram[relatives][:, relatives]
    vectors = torch.linalg.eigh(inside)[1].flip(1)[:, :mixtures]
    rest = torch.eye(len(relatives)).double() - vectors @ vectors.mT
    left = (rest * (inside @ rest)).sum(0)
    alone = left.argsort(descending=True, stable=True)[: len(relatives) - mixtures].sort().values
    rows = torch.zeros(len(relatives), len(gram), dtype=torch.float64)
    rows[:mixtures, relatives] = vectors.mT
    rows[range(mixtures, len(relatives)), torch.tensor(relatives)[alone]] = 1.0
    return [StartBlock(tuple(row), place < mixtures) for place, row in enumerate(rows.tolist())]


def mixture_choices(count: int) -> list[int]:
    """Returns the numbers of mixtures that are tried for so many relatives."""
    return sorted({0, 1, 2, count // 2, count} & set(range(count + 1))) if count > 1 else [0]


def most_ranks(mean: float) -> int:
    """Returns the most rank of a mixture in a layer for blocks of this mean rank."""
    return int(min(max(_PER_RANK * mean, _LEAST), _MOST))


def start_pairs(
    components: Components, blocks: Sequence[StartBlock], most: int, seed: int
) -> list[FactorPair]:  # per block (p, r), (r, q)
    """Returns the blocks of one layer: falling components, the ups orthonormal within a block.

    Args:
        components: of the layer.
        blocks: of the layer's group.
        most: rank of a mixture at most.
        seed: of the subspace iteration.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.tensor([block.direction for block in blocks]).to(components.ups)
    pairs: dict[int, FactorPair] = {}
    for places in _alike(blocks):
        found = _mixtures(components, directions[places], most, generator)
        pairs |= zip(places, found, strict=True)
    mixtures = list(pairs)
    alone: dict[int, FactorPair] = {}
    for place, block in enumerate(blocks):
        if not block.is_mixture:
            own = components.owners == int(directions[place].abs().argmax())
            up, down = components.ups[:, own], components.downs[own]
            shared = [j for j in mixtures if float(directions[j] @ directions[place]) != 0]
            if shared:
                alone[place] = _beside(up, [pairs[j][0] for j in shared]), down
            else:
                pairs[place] = up, down
    pairs |= _in_falling_order(alone)
    return [pairs[place] for place in range(len(blocks))]


def _alike(blocks: Sequence[StartBlock]) -> list[list[int]]:
    """Returns the places of the mixtures, those of the same inputs together."""
    groups: dict[tuple[bool, ...], list[int]] = {}
    for place, block in enumerate(blocks):
        if block.is_mixture:
            groups.setdefault(tuple(x != 0 for x in block.direction), []).append(place)
    return list(groups.values())


def _mixtures(
    components: Components,
    directions: Tensor,  # (g, k), of the same inputs
    most: int,
    generator: torch.Generator,
) -> list[FactorPair]:
    """Returns the truncated SVDs of mixtures, all at once: there are many of them, and each is small."""
    weights, ups, downs = directions[:, components.owners], components.ups, components.downs
    used = weights[0].nonzero().flatten()
    if len(used) < len(components.owners):
        weights, ups, downs = weights[:, used], ups[:, used], downs[used]
    rank = min(most, *ups.shape, downs.shape[1])
    if not rank:
        return [(ups[:, :0], downs[:0])] * len(directions)
    right = random_normal((len(directions), downs.shape[1], rank), downs, generator)
    for _ in range(_TURNS):
        left = orthonormal(ups @ (weights[:, :, None] * (downs @ right)))
        right = downs.mT @ (weights[:, :, None] * (ups.mT @ left))
    _, turn = torch.linalg.eigh((right.mT @ right).double())
    turn = turn.flip(2).to(left)
    return list(zip(left @ turn, turn.mT @ right.mT, strict=True))


def _beside(up: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Returns columns without what lies in the span of others' columns."""
    basis = orthonormal(torch.cat(list(others), 1)[:, : len(up)])
    return up - basis @ (basis.mT @ up)


def _in_falling_order(pairs: Mapping[int, FactorPair]) -> dict[int, FactorPair]:
    if not pairs:
        return {}
    places = list(pairs)
    up, down = pairs[places[0]]
    found = singular_components([pairs[place] for place in places], (len(up), down.shape[1]))
    return {
        place: (found.ups[:, span], found.downs[span])
        for place, span in zip(places, found.spans, strict=True)
    }
