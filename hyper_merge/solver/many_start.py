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
    """Inputs of b layers as components `ups[:, s] @ downs[s]`, as the loss counts them."""

    ups: Tensor  # (b, p, S)
    downs: Tensor  # (b, S, q)
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
) -> list[list[FactorPair]]:  # per layer and block (p, r), (r, q)
    """Returns the blocks of layers: falling components, the ups orthonormal within a block.

    Args:
        components: of the layers.
        blocks: of the layers' group.
        most: rank of a mixture at most.
        seed: of the subspace iteration.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.tensor([block.direction for block in blocks]).to(components.ups)
    mixed: dict[int, FactorPair] = {}  # per block: (b, p, r), (b, r, q)
    for places in _of_same_inputs(blocks):
        found = _mixtures(components, directions[places], most, generator)
        mixed |= zip(places, found, strict=True)
    pairs = [
        {place: (up[i], down[i]) for place, (up, down) in mixed.items()}
        for i in range(len(components.ups))
    ]
    alone: dict[tuple[int, int], FactorPair] = {}
    for place, block in enumerate(blocks):
        if not block.is_mixture:
            own = components.owners == int(directions[place].abs().argmax())
            ups, downs = components.ups[:, :, own], components.downs[:, own]
            shared = [j for j in mixed if float(directions[j] @ directions[place]) != 0]
            if shared:
                ups = _beside(ups, [mixed[j][0] for j in shared])
            alone |= {(i, place): pair for i, pair in enumerate(zip(ups, downs, strict=True))}
    for (i, place), pair in _in_falling_order(alone).items():
        pairs[i][place] = pair
    return [[of_layer[place] for place in range(len(blocks))] for of_layer in pairs]


def _of_same_inputs(blocks: Sequence[StartBlock]) -> list[list[int]]:
    """Returns the places of mixtures, those of the same inputs together."""
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
) -> list[FactorPair]:  # g of (b, p, r), (b, r, q)
    """Returns the truncated SVDs of mixtures, all at once: there are many of them, and each is small."""
    weights, ups, downs = directions.mT[components.owners], components.ups, components.downs
    used = (weights != 0).any(1).nonzero().flatten()
    if len(used) < len(components.owners):
        weights, ups, downs = weights[used], ups[:, :, used], downs[:, used]
    b, p, _ = ups.shape
    mixtures, rank = len(directions), min(most, *ups.shape[1:], downs.shape[2])
    if not rank:
        return [(ups[:, :, :0], downs[:, :0])] * mixtures

    def weighted(columns: Tensor) -> Tensor:  # (b, S, g * r)
        return (columns.view(b, -1, mixtures, rank) * weights[:, :, None]).flatten(2)

    right = random_normal((b, downs.shape[2], mixtures * rank), downs, generator)
    for _ in range(_TURNS):
        left = (ups @ weighted(downs @ right)).view(b, p, mixtures, rank).transpose(1, 2)
        left = orthonormal(left)
        right = downs.mT @ weighted(ups.mT @ left.transpose(1, 2).flatten(2))
    right = right.view(b, -1, mixtures, rank).transpose(1, 2)  # (b, g, q, r)
    _, turn = torch.linalg.eigh((right.mT @ right).double())
    turn = turn.flip(3).to(left)
    return list(zip((left @ turn).unbind(1), (turn.mT @ right.mT).unbind(1), strict=True))


def _beside(
    ups: Tensor,  # (b, p, s)
    others: Sequence[Tensor],  # (b, p, r) each
) -> Tensor:  # (b, p, s)
    """Returns columns without what lies in the span of others' columns."""
    basis = orthonormal(torch.cat(list(others), 2)[:, :, : ups.shape[1]])
    return ups - basis @ (basis.mT @ ups)


def _in_falling_order(
    pairs: Mapping[tuple[int, int], FactorPair],
) -> dict[tuple[int, int], FactorPair]:
    if not pairs:
        return {}
    up, down = next(iter(pairs.values()))
    found = singular_components(list(pairs.values()), (len(up), down.shape[1]))
    return {
        place: (found.ups[:, span], found.downs[span])
        for place, span in zip(pairs, found.spans, strict=True)
    }
