"""Estimates the cost of a solve before it begins."""

from __future__ import annotations

from typing import Final

from hyper_merge.analysis.cache import required_width
from hyper_merge.analysis.inputs import MergeInputs, basis_columns
from hyper_merge.decomposition.initialization import search_cost
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.solver.batching import Ranks
from hyper_merge.solver.solve import (
    OVERCOMPLETE,
    OVERCOMPLETE_SWEEPS,
    START_SWEEPS,
    USUAL_STARTS,
)
from hyper_merge.solver.stopping import USUAL_SWEEPS

_GREEDY_SWEEPS: Final = 2  # that a block of greedy deflation takes

# Factors for small products, which take longer per multiply-add than large ones.
_IN_SWEEP: Final = 4.0
_IN_ROUNDING: Final = 6.5
_IN_REFIT: Final = 12.0  # after rounding to float8


def solve_costs(inputs: MergeInputs, recipe: Recipe, ranks: Ranks) -> tuple[float, float]:
    """Returns the costs of finding and of rounding blocks, in multiply-adds of large products.

    Both are estimates, for the default search.
    """
    width, slices = required_width(recipe.ranks), inputs.contrasts.dimensions
    entries, sweep, rounding = 0.0, 0.0, 0.0
    for layer, rank in zip(inputs.layout.layers, ranks, strict=True):
        p, q = basis_columns(layer, width)
        entries += p * q
        sweep += p * q * (3 * sum(rank) + 2 * slices * len(rank))
        rounding += (layer.m * p + layer.n * q) * sum(rank)
    if recipe.method == "greedy":
        sweeps = float(_GREEDY_SWEEPS * len(recipe.ranks))
    else:
        sweeps = search_cost(entries, USUAL_STARTS) + START_SWEEPS
        sweeps += min(recipe.iterations, USUAL_SWEEPS)
        sweeps += OVERCOMPLETE * OVERCOMPLETE_SWEEPS if recipe.allocation == "adaptive" else 0.0
    refit = _IN_REFIT if recipe.factors_dtype == "float8" else 0.0
    return sweeps * sweep * _IN_SWEEP, rounding * (_IN_ROUNDING + refit)
