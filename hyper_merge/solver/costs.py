"""Estimates the cost of a solve before it begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hyper_merge.analysis.cache import required_width
from hyper_merge.analysis.inputs import MergeInputs, basis_columns, multiplier_groups
from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.solver.batching import Ranks
from hyper_merge.solver.metric import COLUMNS_PER_RANK
from hyper_merge.solver.refinement import TRIAL_SWEEPS
from hyper_merge.solver.solve import OVERCOMPLETE, OVERCOMPLETE_SWEEPS, START_SWEEPS
from hyper_merge.solver.stopping import USUAL_SWEEPS

_GREEDY_SWEEPS: Final = 2  # that a block of greedy deflation takes

# Factors for small products, which take longer per multiply-add than large ones. Adaptive ranks gather in
# few layers, where the same bytes take more.
_IN_SWEEP: Final = 16.5
_IN_EVEN_SWEEP: Final = 4.0
_IN_ROUNDING: Final = 36.0
_IN_EVEN_ROUNDING: Final = 6.5
_IN_REFIT: Final = 12.0  # after rounding to float8

_TURN: Final = 1.2e7  # of a layer in a sweep, whatever its size: dozens of small operations

_METRIC: Final = 75.0  # for an entry of a core and a column of it: its spectra, one by one
_SEARCH: Final = 1e11  # for a start in a few layers' leading parts, whatever their sizes
_START: Final = 0.8  # sweeps that the truncated SVDs take, which follow the search
_PRUNING: Final = 0.4  # the same for it


def solve_costs(inputs: MergeInputs, recipe: Recipe, ranks: Ranks) -> tuple[float, float]:
    """Returns the costs of finding and of rounding blocks, in multiply-adds of large products.

    Both are estimates, for the default search.
    """
    width, slices = required_width(recipe.ranks), inputs.contrasts.dimensions
    pairs = list(zip(inputs.layout.layers, ranks, strict=True))
    bases = [basis_columns(layer, width) for layer, _ in pairs]
    rounding = sum(
        (layer.m * p + layer.n * q) * sum(rank) + _TURN
        for (layer, rank), (p, q) in zip(pairs, bases, strict=True)
    )
    metric = 0.0 if recipe.has_even_ranks else sum(_METRIC * p * q * min(p, q) for p, q in bases)

    def sweeps(more: float) -> float:
        """Returns the cost of a sweep with so many times the ranks, in cores that suit them."""
        return sum(_sweep(layer, rank, width, slices, more) for layer, rank in pairs)

    separate = recipe.multipliers == "separate"
    groups = len(multiplier_groups(inputs.layout.layers, separate=separate))
    search = _SEARCH * groups if recipe.method == "joint" else 0.0
    refit = _IN_REFIT if recipe.factors_dtype == "float8" else 0.0
    if recipe.has_even_ranks:
        count = float(_GREEDY_SWEEPS * len(recipe.ranks))
        if recipe.method == "joint":
            count = START_SWEEPS + min(recipe.iterations, USUAL_SWEEPS)
        solving = search + _IN_EVEN_SWEEP * count * sweeps(1.0)
        return solving, rounding * (_IN_EVEN_ROUNDING + refit)
    solving = metric + search + _IN_SWEEP * _adaptive_sweeps(recipe, slices + 1, sweeps)
    return solving, rounding * (_IN_ROUNDING + refit)


def _adaptive_sweeps(recipe: Recipe, checkpoints: int, sweeps: Callable[[float], float]) -> float:
    """Returns the cost of all sweeps with adaptive ranks; see `_Solver.run` for the stages."""
    trials = 2 if len(recipe.ranks) >= checkpoints else 0  # against private LoRAs
    trial = min(TRIAL_SWEEPS, recipe.iterations)
    last = min(recipe.iterations, USUAL_SWEEPS) + 1 + trials * trial
    return (_START + OVERCOMPLETE_SWEEPS + _PRUNING) * sweeps(OVERCOMPLETE) + last * sweeps(1.0)


def _sweep(
    layer: Layer, ranks: tuple[int, ...], width: int, slices: int, more: float
) -> float:  # multiply-adds
    rank = more * sum(ranks)
    columns = min(width, int(COLUMNS_PER_RANK * rank))
    p, q = basis_columns(layer, columns)
    products = p * q * (3 * rank + 2 * slices * len(ranks))
    return products + 3 * (p + q) * rank**2 + rank**3 + _TURN
