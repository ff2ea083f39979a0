"""Counts squared errors as the loss does: the coordinates in which it is a plain sum of squares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, Final

import torch
from torch import Tensor

from hyper_merge.analysis.contents import Analysis
from hyper_merge.analysis.factored import FactoredAnalysis
from hyper_merge.analysis.inputs import leading_columns
from hyper_merge.analysis.loss_weights import layer_metrics
from hyper_merge.decomposition.bounds import Spectra, compute_spectra, leading_spectra
from hyper_merge.decomposition.contrasts import energies, to_deviations_matrix
from hyper_merge.decomposition.linalg import inner_products
from hyper_merge.decomposition.stretch import LayerMetric, Stretch
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.parcels import OnDemand, SentOnce
from hyper_merge.runtime.progress import Progress

# Of the bases, with which the solver works.
COLUMNS_PER_RANK: Final = 1.25
LEAST_COLUMNS: Final = 64

_PHASE: Final = "weighing the layers"


@dataclass(frozen=True, eq=False)
class Metric(SentOnce):
    """The coordinates in which the loss of a merge is a plain sum of squares.

    Each layer's errors count by its `LayerMetric`; what lies outside of the bases counts as any error
    that is not stretched. With weights w of the checkpoints, sqrt(w) * deviations = Q R slices for
    orthonormal Q: the solver works with R slices, and `to_deviations` turns its solution into
    multipliers.

    Attributes:
        analysis: Of the checkpoints.
        layers: Of the layers; over all of a checkpoint they leave the energy unchanged.
        within: Of the layers: the directions that these stretch between the bases.
        grams: (layers, d + 1, d + 1), float64: inner products of slices and, last, the average's
            rounding error, for checkpoints that count alike.
        checkpoints: (k,), float64: factors of the checkpoints' squared errors, 1 in their mean.
        mix: (d, d), float64: to weighted slices; None where all checkpoints count alike.
        to_deviations: (k, d), float64: from weighted slices.
        columns: Of the bases, in which private LoRAs are looked for.
        check: Called between layers where much is computed; may raise, to stop.
    """

    analysis: Analysis
    layers: Sequence[LayerMetric]
    within: Sequence[_Within]
    grams: Tensor
    checkpoints: Tensor
    mix: Tensor | None
    to_deviations: Tensor
    columns: int
    check: Callable[[], None]

    @classmethod
    def of(cls, analysis: Analysis, recipe: Recipe, progress: Progress | None = None) -> Metric:
        """Returns the metric that a recipe asks for.

        Args:
            analysis: of the checkpoints.
            recipe: the user's settings.
            progress: interrupt; nothing is reported.
        """
        layers = layer_metrics(
            recipe.layer_weights, analysis.weights, analysis.layers, analysis.sensitivities
        )
        check = (progress or Progress()).check
        within, grams = _stretched(analysis, layers, check)
        plain, weighted = (
            float(energies(part, analysis.contrasts).sum()) for part in (analysis.grams, grams)
        )
        factor = plain / weighted if weighted > 0 else 1.0
        checkpoints, mix, to_deviations = _weigh_checkpoints(analysis, recipe)
        return cls(
            analysis,
            tuple(layer.scaled(factor) for layer in layers),
            tuple(within),
            grams * factor,
            checkpoints,
            mix,
            to_deviations,
            max(math.ceil(COLUMNS_PER_RANK * sum(recipe.ranks)), LEAST_COLUMNS),
            check,
        )

    def sent(self) -> dict[str, Any]:
        """Returns what a worker needs, a layer's directions only when it is about that layer."""
        attributes = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**attributes, "layers": OnDemand(self.layers), "within": OnDemand(self.within)}

    def without_ends(self) -> Metric:
        """Returns the metric of a layout whose layers at the ends are averaged only."""
        kept = [place for place, layer in enumerate(self.analysis.layers) if not layer.is_end]
        return replace(
            self,
            analysis=self.analysis.without_ends(),
            layers=tuple(self.layers[place] for place in kept),
            within=tuple(self.within[place] for place in kept),
            grams=self.grams[kept],
        )

    @property
    def unweighted(self) -> Metric:
        """The metric for checkpoints that count alike."""
        if self.mix is None:
            return self
        basis = self.analysis.contrasts.to_deviations
        return replace(
            self, checkpoints=torch.ones_like(self.checkpoints), mix=None, to_deviations=basis
        )

    @cached_property
    def energies(self) -> Tensor:  # (layers, k), float64
        """The squared norms of all deviations, of checkpoints that count alike."""
        return energies(self.grams, self.analysis.contrasts)

    def energy(self, members: Iterable[int]) -> float:
        """Returns the squared norms of all deviations in some layers as the loss counts them."""
        return float((self.energies[list(members)] * self.checkpoints).sum())

    @property
    def directions(self) -> Tensor:  # (d, k), float64
        """The multipliers of private LoRAs, one for each checkpoint, for weighted slices."""
        return (self.checkpoints.sqrt()[:, None] * self.to_deviations).mT

    @property
    def order(self) -> list[int]:
        """The places of the checkpoints, those that differ most first."""
        squares = (self.energies * self.checkpoints).sum(0)
        return squares.argsort(descending=True, stable=True).tolist()

    @property
    def counts_alike(self) -> bool:
        """Tells whether layers, directions and checkpoints all count alike."""
        return self.mix is None and all(
            layer.is_plain and math.isclose(layer.scale, 1.0) for layer in self.layers
        )

    @cached_property
    def spectra(self) -> list[Spectra]:
        """The spectra of every layer as the loss counts them."""
        analysis = self.analysis
        if isinstance(analysis, FactoredAnalysis) and (analysis.has_many or self.mix is None):
            return self._spectra_of_factors(analysis)
        spectra_of = partial(_spectra_of, self, self.directions.mT)
        with analysis.maps(torch.device("cpu"), self.check, _PHASE) as maps:
            return list(maps.layers(spectra_of, range(len(self.layers))))

    def _spectra_of_factors(self, analysis: FactoredAnalysis) -> list[Spectra]:
        """Returns the spectra of LoRAs, whose layers count alike in all directions."""

        def of_layer(index: int) -> Spectra:
            part, scale = analysis.part(index), self.layers[index].scale
            if self.mix is None:
                return part.spectra.scaled(scale)
            return part.weighted_spectra(self.checkpoints * scale)  # deviations are from zero

        with analysis.maps(torch.device("cpu"), self.check, _PHASE) as maps:
            return list(maps.small(of_layer, range(len(self.layers))))

    def representatives(self, members: Iterable[int], count: int) -> list[int]:
        """Returns about so many layers that stand for some: of all sizes, and with energy if any has."""
        layers, energies = self.analysis.layers, self.energies.sum(1).tolist()
        everyone = list(members)
        filled = [i for i in everyone if energies[i] > 0] or everyone
        by_size = sorted(filled, key=lambda i: (layers[i].m + layers[i].n, i))
        step = -(-len(by_size) // count) or 1
        return by_size[step // 2 :: step]

    @cached_property
    def slice_grams(self) -> Tensor:  # (layers, d, d), float64
        """The inner products of the weighted slices."""
        slices = self.grams[:, :-1, :-1]
        return slices if self.mix is None else self.mix @ slices @ self.mix.mT

    @property
    def deviation_gram(self) -> Tensor:  # (k, k), float64
        """The inner products of the checkpoints' deviations, summed over the layers."""
        rows = to_deviations_matrix(self.analysis.contrasts)
        return rows @ self.grams.sum(0) @ rows.mT

    def core(self, index: int, shape: tuple[int, int] | None = None) -> Tensor:  # (d, p, q)
        """Returns a layer's weighted slices between its bases, or the first columns of both."""
        p, q = shape or self.analysis.core_shape(index)
        return self.between(index, (p, q)).apply(self.mixed(self.analysis.core(index)[:, :p, :q]))

    def mixed(self, core: Tensor) -> Tensor:  # (d, p, q)
        """Returns slices as the checkpoints count, without the metric of their layer."""
        return core if self.mix is None else (self.mix.to(core) @ core.flatten(1)).view(core.shape)

    def between(self, index: int, shape: tuple[int, int]) -> LayerMetric:
        """Returns the metric of a layer's matrices between the first columns of its bases."""
        return self.within[index].metric(self.layers[index], shape)


def leading_shape(analysis: Analysis, index: int, columns: int) -> tuple[int, int]:
    """Returns the shape of a core between the first columns of those bases that are ordered."""
    shape = analysis.core_shape(index)
    if analysis.has_many:  # whose bases have no order
        return shape
    return leading_columns(analysis.layers[index], shape, columns)


@dataclass(frozen=True, eq=False)
class _Within:
    """The directions that the metric of a layer stretches, in the coordinates of its bases."""

    left: Tensor  # (p, r)
    right: Tensor  # (q, r)

    def metric(self, layer: LayerMetric, shape: tuple[int, int]) -> LayerMetric:
        """Returns the metric of matrices between the first columns of the bases.

        Columns of a basis are orthonormal, so a vector `basis @ x` has the squared length
        |x|^2 + |diag(gains)^(1/2) V^T basis x|^2.
        """
        if layer.is_plain:
            return layer
        p, q = shape
        return LayerMetric(
            layer.scale,
            Stretch.from_square(self.left[:p], layer.left.gains),
            Stretch.from_square(self.right[:q], layer.right.gains),
        )


def _spectra_of(metric: Metric, roots: Tensor, index: int) -> Spectra:
    analysis = metric.analysis
    if metric.layers[index].is_plain and analysis.contrasts.are_few:
        # Adaptive ranks gather in few layers then, where they are more than the first columns.
        return compute_spectra(metric.core(index), roots)
    shape = leading_shape(analysis, index, metric.columns)
    return leading_spectra(metric.core(index), roots, shape)


def _stretched(
    analysis: Analysis, layers: Sequence[LayerMetric], check: Callable[[], None]
) -> tuple[list[_Within], Tensor]:  # grams (layers, d + 1, d + 1)
    """Returns the directions between the bases, and the inner products that the metrics give."""
    in_layer = partial(_stretched_layer, analysis)
    with analysis.maps(torch.device("cpu"), check, _PHASE) as maps:
        parallel = maps.small if all(layer.is_plain for layer in layers) else maps.layers
        results = list(parallel(in_layer, range(len(layers)), layers, analysis.grams))
    return [within for within, _ in results], torch.stack([gram for _, gram in results])


def _stretched_layer(
    analysis: Analysis, index: int, layer: LayerMetric, plain: Tensor
) -> tuple[_Within, Tensor]:
    if layer.is_plain:
        return _Within(torch.zeros(0, 0), torch.zeros(0, 0)), plain * layer.scale
    left, right = analysis.bases(index)
    within = _Within(
        left.mT @ layer.left.directions.float(), right.mT @ layer.right.directions.float()
    )
    rows = torch.cat([analysis.core(index), analysis.rounding(index)[None]])
    metric = within.metric(layer, analysis.core_shape(index))
    outside = plain - _gram(rows)
    return within, _gram(metric.apply(rows)) + layer.scale * outside


def _gram(rows: Tensor) -> Tensor:  # float64
    flat = rows.flatten(1)
    return inner_products(flat, flat)


def _weigh_checkpoints(
    analysis: Analysis, recipe: Recipe
) -> tuple[Tensor, Tensor | None, Tensor]:  # (k,), (d, d), (k, d), float64
    basis = analysis.contrasts.to_deviations
    if recipe.fit_weights is None:
        return torch.ones(len(basis), dtype=torch.float64), None, basis
    weights = torch.tensor(recipe.fit_weights, dtype=torch.float64)
    weights = weights * len(weights) / weights.sum()
    triangle = torch.linalg.qr(basis * weights.sqrt()[:, None])[1]
    return weights, triangle, basis @ torch.linalg.pinv(triangle)
