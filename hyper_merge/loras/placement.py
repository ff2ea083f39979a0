"""Puts the factors of the modules of a file onto the rows of the layer that they are together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyper_merge.loras.module_names import Place


def place_factors(
    parts: Sequence[tuple[Place, Tensor, Tensor]],  # up (rows of the module, r), down (r, n)
) -> tuple[Tensor, Tensor]:  # (m, sum of r), (sum of r, n)
    """Returns factors of one layer's matrix; rows that no module has are zeros.

    The lower factors are put one below the other, the upper ones onto their rows beside each other. Parts
    that have one lower factor in common keep it once, as they have it where a fused module was split.
    """
    if len(parts) == 1 and _is_whole(parts[0][0]):
        return parts[0][1:]
    lefts: list[Tensor] = []
    downs: list[Tensor] = []
    for place, up, down in parts:
        same = next((i for i, other in enumerate(downs) if torch.equal(other, down)), None)
        if same is None:
            same = len(downs)
            downs.append(down)
            lefts.append(up.new_zeros(place.layer.m, up.shape[1]))
        lefts[same][slice(*place.rows)] = _taken(place, up)
    return torch.cat(lefts, 1), torch.cat(downs)


def _is_whole(place: Place) -> bool:
    height = place.layer.m
    return place.rows == (0, height) and place.shape[0] == height and not place.swapped


def _taken(place: Place, up: Tensor) -> Tensor:
    rows = up[slice(*place.taken)]
    return torch.cat(rows.chunk(2)[::-1]) if place.swapped else rows
