"""Measures energies and spectra as the loss counts them: by layer and by checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyper_merge.analysis.loss_weights import LossWeights, make_loss_weights
from hyper_merge.analysis.store import Analysis
from hyper_merge.decomposition.bounds import Spectra, compute_spectra
from hyper_merge.decomposition.contrasts import energies
from hyper_merge.recipe.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Metric:
    """How much squared errors count.

    Attributes:
        weights: The loss's own coordinates.
        checkpoints: (k,), float64: factors of the checkpoints' squared errors, 1 in their mean.
    """

    weights: LossWeights
    checkpoints: Tensor

    @classmethod
    def of(cls, analysis: Analysis, recipe: Recipe) -> Metric:
        """Returns the metric that a recipe asks for."""
        if recipe.fit_weights is None:
            factors = torch.ones(analysis.contrasts.count, dtype=torch.float64)
        else:
            factors = torch.tensor(recipe.fit_weights, dtype=torch.float64)
        return cls(make_loss_weights(analysis, recipe), factors * len(factors) / factors.sum())

    @property
    def directions(self) -> Tensor:  # (d, k), float64
        """The multipliers of private LoRAs, one for each checkpoint, for weighted slices."""
        return (self.checkpoints.sqrt()[:, None] * self.weights.to_deviations).mT

    def order(self, analysis: Analysis) -> list[int]:
        """Returns the places of the checkpoints, those that differ most first."""
        squares = self.weigh(energies(analysis.grams, analysis.contrasts)).sum(0)
        return squares.argsort(descending=True, stable=True).tolist()

    def weigh(
        self,
        squares: Tensor,  # (layers, k), squared norms
    ) -> Tensor:  # (layers, k)
        """Returns squared norms as the loss counts them."""
        return squares * self.weights.layers[:, None] * self.checkpoints

    def spectra(self, analysis: Analysis) -> list[Spectra]:
        """Returns the spectra of every layer as the loss counts them.

        Where checkpoints count alike, they are those of the analysis; else the cores are read.
        """
        layers = analysis.spectra
        if self.weights.mix is not None:
            roots = self.checkpoints.sqrt()[:, None] * self.weights.to_deviations
            layers = [
                compute_spectra(self.weights.slices(analysis.core(index)), roots)
                for index in range(len(layers))
            ]
        factors = self.weights.layers.tolist()
        return [
            Spectra(layer.rows * factor, layer.columns * factor, layer.private * factor)
            for layer, factor in zip(layers, factors, strict=True)
        ]

    def grams(self, analysis: Analysis) -> Tensor:  # (layers, d, d)
        """Returns the inner products of the slices as the loss counts them."""
        slices = analysis.grams[:, :-1, :-1] * self.weights.layers[:, None, None]
        mix = self.weights.mix
        return slices if mix is None else mix @ slices @ mix.mT
