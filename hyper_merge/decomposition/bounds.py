"""How good it can get: spectra of the cores, a lower bound of the loss, private LoRAs.

All figures are squared norms ("energies"), from the cores; what lies outside of the bases counts as
not explained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Spectra:
    """Squared singular values of one layer, falling."""

    stack: Tensor  # (min(p, q),), of the unfolding of all slices along the shorter side
    private: Tensor  # (k, min(p, q)), of every checkpoint's own deviation


def spectra(
    core: Tensor,  # (d, p, q)
    to_deviations: Tensor,  # (k, d)
) -> Spectra:
    """Squared singular values through Gram matrices: only their sums matter here."""
    if core.shape[1] > core.shape[2]:
        core = core.mT
    own = (to_deviations.to(core) @ core.flatten(1)).view(-1, *core.shape[1:])
    return Spectra(
        stack=_squared_singular_values((core @ core.mT).sum(0)),
        private=_squared_singular_values(own @ own.mT),
    )


def lower_bound(
    layers: Sequence[Spectra],
    energies: Sequence[float],  # of every layer, in and outside of its bases
    ranks: Sequence[tuple[int, ...]],  # of the blocks, per layer
    gram: Tensor,  # (d, d), of the slices over all layers
) -> float:
    """A loss (fraction of all energy) that no shared LoRAs in these bases can go below.

    With rho = sum of its ranks, a layer's approximation has at most rank rho in every unfolding of
    the stack; and over all layers at most R dimensions along the checkpoints.
    """
    total = float(sum(energies))
    if total <= 0:
        return 0.0
    tails = [
        energy - float(layer.stack[: sum(rank)].sum())
        for layer, energy, rank in zip(layers, energies, ranks, strict=True)
    ]
    mode3 = _squared_singular_values(gram)[len(ranks[0]) :].sum() if ranks else 0.0
    return max(float(sum(tails)), float(mode3), 0.0) / total


def private_losses(
    layers: Sequence[Spectra],
    energies: Tensor,  # (layers, k), of every checkpoint's deviation
    ranks: Sequence[tuple[int, ...]],  # of the shared blocks, per layer
) -> Tensor:  # (k,), squared errors
    """What stays unexplained if every checkpoint gets LoRAs of its own for the same bytes.

    A layer's rho ranks are dealt out evenly, what does not divide to those who gain most.
    """
    errors = energies.sum(0)
    for layer, rank in zip(layers, ranks, strict=True):
        each, rest = divmod(sum(rank), len(layer.private))
        errors = errors - layer.private[:, :each].sum(1)
        if rest and each < layer.private.shape[1]:
            following = layer.private[:, each]
            gained = following.topk(rest).indices
            errors[gained] -= following[gained]
    return errors.clamp(min=0)


def _squared_singular_values(gram: Tensor) -> Tensor:  # float64, CPU, falling
    return torch.linalg.eigvalsh(gram).flip(-1).clamp(min=0).double().cpu()
