"""Weights layers in the loss; without weights, all differences count alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from hyper_merge.analysis.sensitivities import Sensitivities
from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.decomposition.sensitivity import Sensitivity
from hyper_merge.decomposition.stretch import LayerMetric, Stretch

_LEAST_SIZE: Final = 0.05  # of a weight's entries, in units of all layers' usual one
# Of the largest: a layer that no output depends on counts next to nothing, but can be divided by.
_LEAST_SENSITIVITY: Final = 1e-12
# What an end layer's change counts more than that of any other: the whole signal passes through it,
# and through other layers a part, beside what skips them.
_TRUNK: Final = 4.0


def layer_metrics(
    choice: str,
    sizes: Tensor,  # (layers,), float64: squared norms of the average's weights
    layers: Sequence[Layer],
    sensitivities: Sensitivities | None,
) -> list[LayerMetric]:
    """Returns how squared errors count in each layer, in any common unit.

    `output` stands for what the error does to the network's output. Where that was measured for every
    layer, it is the geometric mean, direction by direction, of the measured metric and of `relative`:
    what was measured holds for small changes, and those along the most sensitive directions are not
    small; the whole difference of a trained checkpoint along them changes the output far less than
    its gradient says.

    Args:
        choice: the recipe's `layer_weights`.
        sizes: from the analysis.
        layers: of the checkpoints.
        sensitivities: from a run of the network, if it was run.
    """
    measured = _measured(layers, sensitivities) if choice == "output" else None
    if measured is None:
        factors = layer_factors(choice, sizes, layers)
        return _scaled(layer_stretches(layers, None), factors)
    means = torch.tensor([sensitivity.mean for sensitivity in measured], dtype=torch.float64)
    rests = torch.tensor([sensitivity.rest for sensitivity in measured], dtype=torch.float64)
    means = means.clamp(min=_LEAST_SENSITIVITY * float(means.max()))
    factors = (means * rests * relative_weights(sizes, layers)).sqrt()
    return _scaled(layer_stretches(layers, sensitivities), factors)


def layer_stretches(
    layers: Sequence[Layer], sensitivities: Sensitivities | None
) -> list[LayerMetric]:
    """Returns how squared errors count within each layer, by direction, for any weight of the layer.

    Args:
        layers: of the checkpoints.
        sensitivities: from a run of the network; None where errors of a size count alike.
    """
    measured = _measured(layers, sensitivities)
    if measured is None:
        return [LayerMetric(1.0, Stretch.none(x.m), Stretch.none(x.n)) for x in layers]
    return [
        LayerMetric(1.0, sensitivity.left.root, sensitivity.right.root) for sensitivity in measured
    ]


def _scaled(metrics: Sequence[LayerMetric], factors: Tensor) -> list[LayerMetric]:
    return [metric.scaled(x) for metric, x in zip(metrics, factors.tolist(), strict=True)]


def _measured(
    layers: Sequence[Layer], sensitivities: Sensitivities | None
) -> list[Sensitivity] | None:
    """Returns the layers' sensitivities; None unless all are known."""
    known = [(sensitivities or {}).get(layer.module) for layer in layers]
    measured = [sensitivity for sensitivity in known if sensitivity is not None]
    return measured if len(measured) == len(layers) else None


def layer_factors(
    choice: str,
    sizes: Tensor,  # (layers,), float64: squared norms of the average's weights
    layers: Sequence[Layer],
) -> Tensor:  # (layers,), float64
    """Returns how much a squared error counts in each layer where no run of the network says it.

    `output` is as `layout` then: a layer of which every weight is off by the same fraction counts by
    the number of positions at which it is applied, for errors at them add up like independent ones;
    end layers count `_TRUNK` times as much.

    Args:
        choice: the recipe's `layer_weights`.
        sizes: from the analysis.
        layers: of the checkpoints.
    """
    if choice == "plain":
        return torch.ones_like(sizes)
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
