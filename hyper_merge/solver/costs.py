"""Estimates the cost of a solve before it begins."""

from __future__ import annotations

from typing import Final

from hyper_merge.analysis.cache import required_width
from hyper_merge.analysis.inputs import MergeInputs, basis_columns, multiplier_groups
from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.solver.batching import Ranks
from hyper_merge.solver.metric import COLUMNS_PER_RANK, LEAST_COLUMNS
from hyper_merge.solver.refinement import TRIAL_SWEEPS
from hyper_merge.solver.solve import OVERCOMPLETE, OVERCOMPLETE_SWEEPS, START_SWEEPS
from hyper_merge.solver.stopping import USUAL_SWEEPS

_GREEDY_SWEEPS: Final = 2  # that a block of greedy deflation takes

# Factors for small products, which take longer per multiply-add than large ones. Adaptive ranks gather
# in few layers, where the same bytes take more.
_IN_SWEEP: Final = 27.0
_IN_EVEN_SWEEP: Final = 3.2
_IN_ROUNDING: Final = 29.0
_IN_REFIT: Final = 24.0  # after rounding to float8
_MANY_COLUMNS: Final = 290.0  # with more, a product takes no longer than with these
_LARGEST_SHARE: Final = 0.35  # of a layer's own rank, which adaptive ranks come to in small layers

# Of a layer in a sweep, whatever its size, of each of its blocks, and of a layer when it is rounded:
# dozens of small operations.
_TURN: Final = 2.5e7
_BLOCK: Final = 8.4e7
_ROUNDED: Final = 4.2e8

_SPECTRA: Final = 66.0  # for an entry of a core and a column of it: they are found one by one
_SEARCH: Final = 5e10  # for a start in a few layers' leading parts, whatever their sizes
_START: Final = 0.47  # of what spectra take: the truncated SVDs that follow the search
_PRUNING: Final = 0.7  # sweeps that it takes


def solve_costs(inputs: MergeInputs, recipe: Recipe, ranks: Ranks) -> tuple[float, float]:
    """Returns the costs of finding and of rounding blocks, in multiply-adds of large products.

    Both are estimates, for the default search.
    """
    width, slices = required_width(recipe.ranks), inputs.contrasts.dimensions
    pairs = list(zip(inputs.layout.layers, ranks, strict=True))
    bases = [basis_columns(layer, width) for layer, _ in pairs]
    per_entry = _IN_ROUNDING + (_IN_REFIT if recipe.factors_dtype == "float8" else 0.0)
    rounding = sum(
        per_entry * (layer.m * p + layer.n * q) * sum(rank) + _ROUNDED
        for (layer, rank), (p, q) in zip(pairs, bases, strict=True)
    )
    spectra = sum(_SPECTRA * p * q * min(p, q) for p, q in bases)

    def sweeps(more: float, *, narrow: bool) -> float:
        """Returns the cost of a sweep with so many times the ranks."""
        return sum(
            _sweep(recipe, layer, rank, slices, more=more, narrow=narrow) for layer, rank in pairs
        )

    separate = recipe.multipliers == "separate"
    groups = len(multiplier_groups(inputs.layout.layers, separate=separate))
    search = _SEARCH * groups + _START * spectra if recipe.method == "joint" else 0.0
    if recipe.has_even_ranks:
        count = float(_GREEDY_SWEEPS * len(recipe.ranks))
        if recipe.method == "joint":
            count = START_SWEEPS + min(recipe.iterations, USUAL_SWEEPS)
        return spectra + search + count * sweeps(1.0, narrow=False), rounding
    trials = 2 if len(recipe.ranks) >= slices + 1 else 0  # against private LoRAs
    last = min(recipe.iterations, USUAL_SWEEPS) + trials * min(TRIAL_SWEEPS, recipe.iterations)
    solving = (OVERCOMPLETE_SWEEPS + _PRUNING) * sweeps(OVERCOMPLETE, narrow=False)
    solving += last * sweeps(1.0, narrow=True) + sweeps(1.0, narrow=False)
    return spectra + search + solving, rounding


def _sweep(
    recipe: Recipe,
    layer: Layer,
    ranks: tuple[int, ...],
    slices: int,
    *,
    more: float,
    narrow: bool,
) -> float:
    """Returns the cost of a sweep in one layer; bases as wide as the layer are narrowed late."""
    width, limit = required_width(recipe.ranks), min(layer.m, layer.n)
    share = 1.0 if recipe.has_even_ranks else _LARGEST_SHARE
    rank = max(1.0, min(more * sum(ranks), share * limit, width))
    columns = min(width, max(COLUMNS_PER_RANK * rank, LEAST_COLUMNS))
    p, q = (
        size if size <= width and not narrow else min(size, columns) for size in (layer.m, layer.n)
    )
    products = p * q * (3 * rank + 2 * slices * len(ranks)) + 3 * (p + q) * rank**2 + rank**3
    factor = _IN_EVEN_SWEEP if recipe.has_even_ranks else _IN_SWEEP
    return factor * products * min(1.0, _MANY_COLUMNS / rank) + _TURN + _BLOCK * len(ranks)
