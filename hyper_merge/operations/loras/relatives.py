"""Finds which of many LoRAs have something in common, and how many bytes each set of them is worth."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from hyper_merge.analysis.factored import FactoredAnalysis, usual_weights
from hyper_merge.analysis.inputs import multiplier_groups
from hyper_merge.analysis.loss_weights import layer_metrics
from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.io.dtypes import DTYPES_BY_WORD
from hyper_merge.decomposition.clustering import find_relatives
from hyper_merge.decomposition.factored import (
    FEW,
    FactorPair,
    compress_many,
)
from hyper_merge.decomposition.rank_allocation import last_rate
from hyper_merge.loras.input_lora import InputLora
from hyper_merge.operations.loras.analysis import basis_width, factor_pair, widths_of_many
from hyper_merge.operations.loras.inputs import LoraSet
from hyper_merge.operations.merge.preflight import Preflight, least_bytes
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.metric import Metric
from hyper_merge.solver.mixture_spectra import forecast_ranks

_SAMPLE: Final = 16  # layers
_LEAST_SEEN: Final = 4  # of each file in each part of the network
_LEAST_FILES: Final = 2.0  # times the smallest file: what a set must be worth
_PHASE: Final = "comparing the LoRAs"

# Of a file, for what only the whole knows: its number, and all ranks, which every file records.
_DIGITS_OF_A_FILE: Final = 64
_DIGITS_OF_A_RANK: Final = 5


@dataclass(frozen=True)
class Relatives:
    """LoRAs that are shared among themselves.

    Attributes:
        places: Of its members among all LoRAs, rising.
        budget: Bytes of their shared LoRAs; None where a target decides.
    """

    places: tuple[int, ...]
    budget: int | None


def may_fall_apart(merge: Preflight) -> bool:
    """Tells whether LoRAs are shared set by set, where they fall into sets of relatives.

    Not where all must be looked at together: given ranks say how many files there are, private LoRAs
    go to those below the mean of all, and priorities hold among all.
    """
    recipe = merge.recipe
    return (
        len(merge.inputs.headers) > FEW
        and recipe.finds_ranks
        and recipe.method == "joint"
        and recipe.topup is None
        and recipe.fit_weights is None
    )


def find_relative_sets(merge: Preflight, loras: LoraSet, progress: Progress) -> list[Relatives]:
    """Returns the sets of LoRAs that have something in common, by a sample of the layers.

    Sets that are worth less than the smallest file are joined.

    Args:
        merge: the validated recipe.
        loras: the files.
        progress: progress and interrupt.

    Raises:
        CheckpointError: a file was changed, or holds an alpha that is no positive number.
        NonFiniteError: a file holds NaN or infinity.
    """
    comparing, weighing = progress.split((1.0, 1.0))
    with ExitStack() as stack:
        files = [stack.enter_context(InputLora(modules)) for modules in loras.files]
        sets = _sets(_grams(common_sample(loras), files, comparing))
        if merge.recipe.budget is None or len(sets) == 1:
            return [Relatives(tuple(places), None) for places in sets]
        worth = _worth(merge, loras, files, sets, weighing)
    return _with_budgets(merge, sets, worth)


def common_sample(loras: LoraSet) -> list[Layer]:
    """Returns layers of all sizes, some of which every file has in every part that it changes at all."""
    chosen = {layer.module for layer in _by_size(loras.layers, _SAMPLE)}
    for kind in dict.fromkeys(frozenset(modules.layers) for modules in loras.files):
        own = [layer for layer in loras.layers if layer.module in kind]
        for part in sorted({layer.part for layer in own}):
            of_part = [layer for layer in own if layer.part == part]
            seen = sum(layer.module in chosen for layer in of_part)
            if seen < min(_LEAST_SEEN, len(of_part)):
                chosen.update(layer.module for layer in _by_size(of_part, _LEAST_SEEN))
    return [layer for layer in loras.layers if layer.module in chosen]


def _by_size(layers: Sequence[Layer], count: int) -> list[Layer]:
    """Returns about so many layers of all sizes."""
    by_size = sorted(layers, key=lambda layer: layer.m + layer.n)
    step = -(-len(by_size) // count)
    return by_size[step // 2 :: step]


def _sets(grams: Sequence[Tensor]) -> list[list[int]]:
    """Returns the sets of relatives; those that change nothing are with the first of the others."""
    sets = find_relatives(*grams)
    changes = [
        any(float(gram[place, place]) > 0 for gram in grams) for place in range(len(grams[0]))
    ]
    idle = [place for place, changes_any in enumerate(changes) if not changes_any]
    busy = [places for places in sets if changes[places[0]]]
    if not busy:
        return [list(range(len(changes)))]
    return [sorted(busy[0] + idle), *busy[1:]]


def _grams(
    layers: Sequence[Layer], files: Sequence[InputLora], progress: Progress
) -> list[Tensor]:  # (k, k) each, float64
    """Returns the inner products of all LoRAs' changes, by part of the network."""
    grams: dict[str, Tensor] = {}
    for place, layer in enumerate(layers, 1):
        gram = _gram([factor_pair(file, layer) for file in files])
        grams[layer.part] = grams.get(layer.part, torch.zeros_like(gram)) + gram
        progress.report(_PHASE, place / len(layers))
    return list(grams.values())


def _gram(pairs: Sequence[FactorPair]) -> Tensor:  # (k, k), float64
    ups, downs = torch.cat([up for up, _ in pairs], 1), torch.cat([down for _, down in pairs])
    sizes = torch.tensor([up.shape[1] for up, _ in pairs])
    owners = torch.arange(len(pairs)).repeat_interleave(sizes)
    gram = torch.zeros(len(pairs), len(pairs), dtype=torch.float64)
    for row, (up, down) in zip(gram, pairs, strict=True):  # one by one: all products are many
        products = (up.mT @ ups) * (down @ downs.mT)
        row.index_add_(0, owners, products.sum(0).double())
    return gram


def _worth(
    merge: Preflight,
    loras: LoraSet,
    files: Sequence[InputLora],
    sets: Sequence[Sequence[int]],
    progress: Progress,
) -> list[float]:
    """Returns the bytes that each set takes of a budget which goes where it explains most."""
    forecasts = []
    parts = progress.split([1.0] * len(sets))
    for places, part in zip(sets, parts, strict=True):
        own = replace(loras, files=tuple(loras.files[place] for place in places))
        forecasts.append(_forecast(merge, own, [files[place] for place in places], part))
    rates, prices = zip(*forecasts, strict=True)
    last = last_rate(rates, prices, merge.recipe.budget or 0)
    return [
        float(price[(rate >= last) & (rate > 0)].sum())
        for rate, price in zip(rates, prices, strict=True)
    ]


def _forecast(
    merge: Preflight, loras: LoraSet, files: Sequence[InputLora], progress: Progress
) -> tuple[Tensor, Tensor]:  # (components,) each, float64
    """Returns what the components of a set's mixtures gain for a byte, and about the bytes of each.

    Those of a sample stand for all layers that any file of the set has.
    """
    recipe, layers = merge.recipe, merge.inputs.layout.layers
    size = DTYPES_BY_WORD[recipe.factors_dtype].itemsize
    names = {name for file in files for name in file.modules}
    present = tuple(layer for layer in layers if layer.module in names)
    sample = common_sample(replace(loras, layers=present))
    width_for = widths_of_many(loras, files, recipe, basis_width(recipe.ranks))
    parts = [
        compress_many(
            [factor_pair(file, layer) for file in files],
            (layer.m, layer.n),
            partial(width_for, layer),
        )
        for layer in sample
    ]
    metric = Metric.of(FactoredAnalysis(sample, len(files), parts), recipe, progress)
    groups = multiplier_groups(sample, separate=recipe.multipliers == "separate")
    costs = [size * (layer.m + layer.n) for layer in sample]
    stems = [file.path.stem for file in files]
    forecast = forecast_ranks(metric, groups, stems, costs, progress)
    # The metric of a set makes its squares add up as plain ones do. What they are in a unit of all sets:
    scales = layer_metrics(recipe.layer_weights, usual_weights(layers), layers, None)
    unit = metric.layers[0].scale / scales[layers.index(sample[0])].scale
    times = size * sum(layer.m + layer.n for layer in present) / sum(forecast.costs)
    rates, prices = [], []
    for place, mixtures, price in zip(
        forecast.sampled, forecast.mixtures, forecast.costs, strict=True
    ):
        for values in mixtures:
            rates.append(values / (costs[place] * unit))
            prices.append(torch.full_like(values, times * price))
    return torch.cat(rates), torch.cat(prices)


def _with_budgets(
    merge: Preflight, sets: Sequence[Sequence[int]], worth: Sequence[float]
) -> list[Relatives]:
    """Returns the sets with what they may take of the budget, those joined that have less than a file.

    Each has as many files as members at most, and for each file what it holds beside its factors.
    """
    recipe, layers = merge.recipe, merge.inputs.layout.layers
    size, count = DTYPES_BY_WORD[recipe.factors_dtype].itemsize, len(merge.inputs.headers)
    least = least_bytes(recipe, merge.inputs)
    beside = least - size * sum(layer.m + layer.n for layer in layers)
    slack = count * (_DIGITS_OF_A_FILE + _DIGITS_OF_A_RANK * count)
    left = max((recipe.budget or 0) - slack - count * beside, 0)
    whole = sum(worth)
    budgets = [
        (len(places) * beside + left * part / whole, tuple(places))
        for places, part in zip(sets, worth, strict=True)
    ]
    budgets.sort(reverse=True)
    while len(budgets) > 1 and budgets[-1][0] < _LEAST_FILES * least:
        (one, places), (other, more) = budgets.pop(), budgets.pop()
        budgets.append((one + other, tuple(sorted(places + more))))
        budgets.sort(reverse=True)
    joined = [Relatives(places, int(budget)) for budget, places in budgets]
    return sorted(joined, key=lambda relatives: relatives.places)
