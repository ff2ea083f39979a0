"""Weights checkpoints and layers in the loss; without weights, all differences count alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hyper_merge.analysis.store import Analysis
from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.decomposition.contrasts import energies
from hyper_merge.recipe.recipe import Recipe

_LEAST_SIZE: Final = 0.05  # of a weight's entries, in units of all layers' usual one
# Of the largest: a layer that no output depends on counts next to nothing, but can be divided by.
_LEAST_SENSITIVITY: Final = 1e-12
# What an end layer's change counts more than that of any other: the whole signal passes through it,
# and through other layers a part, beside what skips them.
_TRUNK: Final = 4.0


@dataclass(frozen=True, eq=False)
class LossWeights:
    """Coordinates in which the weighted loss is a plain sum of squares.

    With weights w of the checkpoints, sqrt(w) * deviations = Q R slices for orthonormal Q: the
    solver works with R slices, and `to_deviations` turns its solution into multipliers.
    """

    # (layers,), float64: factors of the squared errors, 1 in the energy's mean
    layers: Tensor
    # (d, d), float64: to weighted slices; None where all checkpoints count alike
    mix: Tensor | None
    # (k, d), float64: from weighted slices
    to_deviations: Tensor
    # (layers,), float64: weighted, of all deviations
    energies: Tensor

    def core(self, index: int, core: Tensor) -> Tensor:  # (d, p, q)
        """Returns a layer's core, or a part of it, in weighted slices."""
        scale = float(self.layers[index]) ** 0.5
        mixed = self.slices(core)
        return mixed if scale == 1 else mixed * scale

    def slices(self, core: Tensor) -> Tensor:  # (d, p, q)
        """Returns the weighted slices of a core, without the weight of its layer."""
        return core if self.mix is None else (self.mix.to(core) @ core.flatten(1)).view(core.shape)

    def energy(self, members: Sequence[int]) -> float:
        """Returns the weighted energy of some layers' deviations."""
        return float(self.energies[list(members)].sum())


def make_loss_weights(analysis: Analysis, recipe: Recipe) -> LossWeights:
    """Returns the weights that a recipe asks for."""
    squares = energies(analysis.grams, analysis.contrasts)  # (layers, k)
    layers = layer_weights(analysis, recipe)
    basis = analysis.contrasts.to_deviations
    if recipe.fit_weights is None:
        return LossWeights(layers, None, basis, squares.sum(1) * layers)
    weights = torch.tensor(recipe.fit_weights, dtype=torch.float64)
    weights = weights * len(weights) / weights.sum()
    triangle = torch.linalg.qr(basis * weights.sqrt()[:, None])[1]
    back = basis @ torch.linalg.pinv(triangle)
    return LossWeights(layers, triangle, back, (squares * weights).sum(1) * layers)


def layer_weights(analysis: Analysis, recipe: Recipe) -> Tensor:  # (layers,), float64
    """Returns factors of the layers' squared errors that leave the total energy unchanged."""
    squares = energies(analysis.grams, analysis.contrasts).sum(1)
    factors = layer_factors(
        recipe.layer_weights, analysis.weights, analysis.layers, analysis.sensitivities
    )
    weighted = float((factors * squares).sum())
    return factors * (float(squares.sum()) / weighted) if weighted > 0 else torch.ones_like(squares)


def layer_factors(
    choice: str,
    sizes: Tensor,  # (layers,), float64: squared norms of the average's weights
    layers: Sequence[Layer],
    sensitivities: Mapping[str, float] | None,  # by module, from a run of the network
) -> Tensor:  # (layers,), float64
    """Returns how much a squared error counts in each layer, in any common unit.

    `output` stands for what the error does to the network's output. Where the mean squared gradient
    of the output was measured for every layer, that is its geometric mean with `relative`: the
    gradient holds for small changes in random directions, and differences of trained checkpoints are
    neither, most of all in layers that hardly count; on trained families the mean leaves a quarter
    less of the function than the gradient alone. Else it is as `layout`: there a layer of which
    every weight is off by the same fraction counts by the number of positions at which it is
    applied, for errors at them add up like independent ones. End layers count `_TRUNK` times as much.

    Args:
        choice: the recipe's `layer_weights`.
        sizes: from the analysis.
        layers: of the checkpoints.
        sensitivities: measured ones, if there are any.
    """
    if choice == "plain":
        return torch.ones_like(sizes)
    if choice == "output" and sensitivities:
        known = [sensitivities.get(layer.module) for layer in layers]
        if all(value is not None for value in known):
            measured = torch.tensor(known, dtype=torch.float64)
            measured = measured.clamp(min=_LEAST_SENSITIVITY * float(measured.max()))
            return (measured * relative_weights(sizes, layers)).sqrt()
    if choice in ("output", "layout"):
        uses = [layer.positions * (_TRUNK if layer.is_end else 1) for layer in layers]
        return relative_weights(sizes, layers) * torch.tensor(uses, dtype=torch.float64)
    return relative_weights(sizes, layers)


def relative_weights(
    sizes: Tensor,  # (layers,), float64: squared norms of the average's weights
    layers: Sequence[Layer],
) -> Tensor:  # (layers,), float64
    """Returns one over each layer's size, so that errors count relative to the weights they change.

    A layer with a tiny norm, such as one that training initialised at zero, would outweigh all others;
    its entries count as at least a small fraction of the usual ones.
    """
    entries = torch.tensor([layer.m * layer.n for layer in layers], dtype=torch.float64)
    usual = float(sizes.sum() / entries.sum())
    if not usual > 0:
        return torch.ones_like(sizes)
    return torch.maximum(sizes, _LEAST_SIZE**2 * usual * entries).reciprocal()
