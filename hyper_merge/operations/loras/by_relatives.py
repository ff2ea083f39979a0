"""Shares many LoRAs set by set, each set among its relatives, and joins what comes of it.

A LoRA's multipliers are 0 for all that belong to other sets, so that the work grows with the squares of
the sets and not of all, and a prompt names the LoRAs of one set only.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyper_merge.analysis.factored import FactoredAnalysis
from hyper_merge.decomposition.bounds import Spectra
from hyper_merge.decomposition.factored import FactoredLayer
from hyper_merge.operations.loras.analysis import analyze_loras
from hyper_merge.operations.loras.inputs import LoraSet
from hyper_merge.operations.loras.relatives import Relatives
from hyper_merge.operations.merge.file_overhead import FileOverhead
from hyper_merge.operations.merge.preflight import Preflight, with_ranks
from hyper_merge.operations.merge.rank_plan import plan_ranks
from hyper_merge.operations.merge.solved_merge import SolvedMerge
from hyper_merge.operations.merge.solving import Search, solve_shared
from hyper_merge.runtime.progress import Progress
from hyper_merge.runtime.scratch import Scratch
from hyper_merge.solver.evaluation import evaluate
from hyper_merge.solver.metric import Metric
from hyper_merge.solver.products import Products, StoredFactors, keep_pairs


@dataclass(frozen=True, eq=False)
class _SharedSet:
    """What the LoRAs of one set are shared as."""

    places: tuple[int, ...]
    parts: Sequence[FactoredLayer]  # without bases
    scale: float  # of the first layer in the set's metric; all differ from others by one factor
    solved: SolvedMerge

    @property
    def unused(self) -> int:
        """The bytes of the set's budget that no rank fits in; 0 where it has none."""
        recipe, allowance = self.solved.plan.recipe, self.solved.plan.allowance
        if recipe.budget is None or allowance is None:
            return 0
        return max(recipe.budget - allowance.size(self.solved.factors.ranks), 0)


def share_by_relatives(
    sets: Sequence[Relatives],
    merge: Preflight,
    loras: LoraSet,
    overhead: FileOverhead,
    search: Search,
    progress: Progress,
) -> tuple[Metric, SolvedMerge]:
    """Returns the metric of all LoRAs, of which it has no bases, and the shared LoRAs of all sets.

    Args:
        sets: that hold every LoRA once.
        merge: the validated recipe.
        loras: the files.
        overhead: of the files that are written, each of which names all LoRAs.
        search: costs, start and effort.
        progress: progress and interrupt.

    Raises:
        HyperMergeError: as `analyze_loras` and `solve_shared`.
    """
    parts = progress.split([float(len(relatives.places)) for relatives in sets])
    shared: list[_SharedSet] = []
    left = 0  # bytes that one set could not use are the next one's
    with closing(Scratch(merge.folders.cache)) as scratch:
        for number, (relatives, part) in enumerate(zip(sets, parts, strict=True), 1):
            budget = None if relatives.budget is None else relatives.budget + left
            chosen, noted = (
                replace(relatives, budget=budget),
                part.noted(f"set {number} of {len(sets)}"),
            )
            shared.append(_share_set(chosen, merge, loras, overhead, search, scratch, noted))
            left = shared[-1].unused
    metric = Metric.of(_joined_analysis(shared, merge), merge.recipe, progress)
    return metric, _joined(shared, metric, merge, overhead)


def _share_set(
    relatives: Relatives,
    merge: Preflight,
    loras: LoraSet,
    overhead: FileOverhead,
    search: Search,
    scratch: Scratch,
    progress: Progress,
) -> _SharedSet:
    chosen = [loras.files[place] for place in relatives.places]
    own_loras = replace(loras, files=tuple(chosen))
    recipe = replace(merge.recipe, budget=relatives.budget)
    inputs = own_loras.inputs(merge.inputs.dtype)
    own = replace(merge, recipe=with_ranks(recipe, inputs), inputs=inputs)
    reading, solving = progress.split((1.0, 2.0))
    with analyze_loras(own_loras, own.recipe, merge.folders.cache, reading, many=True) as analysis:
        metric = Metric.of(analysis, own.recipe, solving)
        overhead = replace(overhead, recipe=own.recipe)
        solved = solve_shared(metric, own, overhead, search, solving)
        kept = [keep_pairs(scratch.keep, pairs) for pairs in solved.factors.factors]
        solved = replace(solved, factors=replace(solved.factors, factors=kept))
        parts = [_without_bases(analysis.part(index)) for index in range(len(loras.layers))]
    return _SharedSet(relatives.places, parts, metric.layers[0].scale, solved)


def _without_bases(part: FactoredLayer) -> FactoredLayer:
    """Returns what the report needs to know of a layer."""
    nothing = torch.zeros(0, 0)
    spans = (slice(0, 0),) * len(part.spans)
    return FactoredLayer(
        nothing, nothing, nothing, nothing, spans, part.gram, part.spectra, torch.zeros(0)
    )


def _joined_analysis(sets: Sequence[_SharedSet], merge: Preflight) -> FactoredAnalysis:
    """Returns the analysis of all sets, whose members have no inner products with those of others."""
    layers, count = merge.inputs.layout.layers, len(merge.inputs.headers)
    places = [list(of_set.places) for of_set in sets]
    parts = []
    for of_layer in zip(*(of_set.parts for of_set in sets), strict=True):
        gram = torch.zeros(count, count, dtype=torch.float64)
        for members, part in zip(places, of_layer, strict=True):
            at = torch.tensor(members)
            gram[at[:, None], at] = part.gram
        spectra = _joined_spectra([part.spectra for part in of_layer], places, count)
        parts.append(replace(of_layer[0], spans=(slice(0, 0),) * count, gram=gram, spectra=spectra))
    return FactoredAnalysis(layers, count, parts)


def _joined_spectra(
    spectra: Sequence[Spectra], places: Sequence[Sequence[int]], count: int
) -> Spectra:
    """Returns the spectra of sets side by side, with which the bound holds for LoRAs of one set each."""
    width = max(part.private.shape[1] for part in spectra)
    private = torch.zeros(count, width, dtype=torch.float64)
    for members, part in zip(places, spectra, strict=True):
        private[list(members), : part.private.shape[1]] = part.private
    rows, columns = (
        torch.cat(sides).sort(descending=True).values
        for sides in ([part.rows for part in spectra], [part.columns for part in spectra])
    )
    return Spectra(rows, columns, private)


def _joined(
    sets: Sequence[_SharedSet], metric: Metric, merge: Preflight, overhead: FileOverhead
) -> SolvedMerge:
    """Returns the shared LoRAs of all sets, one set's after the other's."""
    ranks = tuple(rank for of_set in sets for rank in of_set.solved.plan.recipe.ranks)
    recipe = replace(merge.recipe, ranks=ranks)
    # The ends of a budget are those of the sets.
    plan = plan_ranks(recipe, overhead.inputs, sum(x.solved.factor_bytes() for x in sets))
    factors = StoredFactors(
        factors=[
            [pair for of_set in of_layer for pair in of_set]
            for of_layer in zip(*(x.solved.factors.factors for x in sets), strict=True)
        ],
        plain=_joined_products([x.solved.factors.plain for x in sets], sets, metric),
        weighted=_joined_products(
            [_scaled(x.solved.factors.weighted, metric.layers[0].scale / x.scale) for x in sets],
            sets,
            metric,
        ),
        alphas=tuple(alpha for x in sets for alpha in x.solved.factors.alphas),
    )
    multipliers = {
        name: _block_diagonal(
            [x.solved.evaluation.multipliers[name] for x in sets], sets, len(merge.inputs.headers)
        )
        for name in plan.groups
    }
    evaluation = evaluate(metric, factors, plan.groups, multipliers)
    return SolvedMerge(plan, factors, evaluation, _joined_losses(sets))


def _scaled(products: Products, factor: float) -> Products:
    return Products(products.cross * factor, products.gram * factor)


def _joined_products(
    products: Sequence[Products], sets: Sequence[_SharedSet], metric: Metric
) -> Products:
    """Returns the products of all LoRAs and blocks, 0 between those of different sets."""
    layers, blocks = len(metric.layers), sum(part.gram.shape[1] for part in products)
    rows = metric.analysis.contrasts.dimensions + 1
    cross = torch.zeros(layers, rows, blocks, dtype=torch.float64)
    gram = torch.zeros(layers, blocks, blocks, dtype=torch.float64)
    start = 0
    for part, of_set in zip(products, sets, strict=True):
        block = slice(start, start + part.gram.shape[1])
        # Deviations from zero: a row for each LoRA, and one for the base, which has no error.
        cross[:, list(of_set.places), block] = part.cross[:, :-1]
        gram[:, block, block] = part.gram
        start = block.stop
    return Products(cross, gram)


def _block_diagonal(
    multipliers: Sequence[Tensor], sets: Sequence[_SharedSet], count: int
) -> Tensor:  # (count, R)
    joined = torch.zeros(count, sum(part.shape[1] for part in multipliers), dtype=torch.float64)
    start = 0
    for part, of_set in zip(multipliers, sets, strict=True):
        joined[list(of_set.places), start : start + part.shape[1]] = part
        start += part.shape[1]
    return joined


def _joined_losses(sets: Sequence[_SharedSet]) -> tuple[float, ...]:
    """Returns what is left after each sweep; a set that ends earlier keeps its last loss."""
    energies = [float(x.solved.evaluation.weighted_energies.sum()) / x.scale for x in sets]
    losses = [x.solved.losses for x in sets]
    total = sum(energies) or 1.0
    return tuple(
        sum(
            energy * row[min(sweep, len(row) - 1)]
            for energy, row in zip(energies, losses, strict=True)
            if row
        )
        / total
        for sweep in range(max(map(len, losses)))
    )
