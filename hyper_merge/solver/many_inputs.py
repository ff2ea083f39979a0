"""Solves for blocks of many inputs of low rank, from a start in closed form and with few sweeps on factors."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, cast

import torch
from torch import Tensor

from hyper_merge.analysis.factored import FactoredAnalysis
from hyper_merge.decomposition.clustering import find_relatives
from hyper_merge.decomposition.factored import FactoredLayer
from hyper_merge.decomposition.factored_batch import (
    FactoredBatch,
    Form,
    SweptTogether,
    layers_of_one_form,
)
from hyper_merge.decomposition.ll1 import solve_ll1
from hyper_merge.decomposition.normalization import even_out
from hyper_merge.decomposition.problem import Factors, Problem
from hyper_merge.decomposition.rank_allocation import last_rate
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.parallel import ParallelMap
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.allowance import Allowance
from hyper_merge.solver.many_start import (
    Components,
    StartBlock,
    mixture_choices,
    most_ranks,
    relatives_blocks,
    start_pairs,
)
from hyper_merge.solver.metric import Metric
from hyper_merge.solver.products import FactorPair
from hyper_merge.solver.rank_pruning import GroupSolution, given_away, prune_ranks
from hyper_merge.solver.stopping import SolverProgress, stop_by_sweep

_SAMPLE: Final = 8  # layers, from which the start is chosen
_OVERCOMPLETE: Final = 1.2  # times the bytes, of which the best are kept
_LEAST_SWEEPS: Final = 3
_SWEEPS_TIMES_INPUTS: Final = 150  # more of them where that is soon done
_SWEEPS_TIMES_LAYERS: Final = 3000
_PER_COLUMN: Final = 2.0  # components in a sweep for a column of the bases: the largest
_LEAST_COMPONENTS: Final = 384
_RIDGE: Final = 0.01  # as where inputs are few


def are_many(metric: Metric, recipe: Recipe) -> bool:
    """Tells whether this is the way for these inputs: many, given as factors."""
    return (
        metric.analysis.has_many
        and len(recipe.ranks) <= metric.analysis.contrasts.count
        and recipe.method == "joint"  # several at once
    )


def solve_many(
    metric: Metric,
    recipe: Recipe,
    allowance: Allowance,
    groups: Mapping[str, Sequence[int]],
    parallel: ParallelMap,
    progress: Progress,
) -> list[GroupSolution]:
    """Returns the blocks of all groups within the allowance.

    Args:
        metric: of the loss, of an analysis in factors.
        recipe: with at most as many ranks as inputs.
        allowance: the bytes.
        groups: the layers of each set of multipliers.
        parallel: a map over layers.
        progress: progress and interrupt.
    """
    solver = _Solver(metric, recipe, allowance, parallel)
    parts = progress.split([*([1.0] * len(groups)), *([3.0] * len(groups))])
    blocks = {name: solver.choose(members) for name, members in groups.items()}
    price = solver.price(groups, blocks)
    started = [
        solver.started(name, groups[name], blocks[name], price, part)
        for name, part in zip(groups, parts, strict=False)
    ]
    pruned = prune_ranks(started, allowance, parallel, is_balanced=True)
    del started
    return [solver.swept(pruned, part) for part in parts[len(groups) :]]


@dataclass(frozen=True, eq=False)
class _Solver:
    metric: Metric
    recipe: Recipe
    allowance: Allowance
    parallel: ParallelMap

    def started(
        self,
        name: str,
        members: Sequence[int],
        blocks: Sequence[StartBlock],
        price: float,
        part: Progress,
    ) -> GroupSolution:
        """Returns a group with the components that are worth the price of a byte."""
        multipliers = torch.tensor([block.direction for block in blocks]).double().mT
        keep = self.metric.analysis.scratch.keep

        def start(indices: Sequence[int]) -> dict[int, tuple[FactoredBatch, Factors]]:
            started = {}
            for index, pairs in zip(indices, self._pairs(indices, blocks), strict=True):
                least = price * self.allowance.costs[index]
                ranks = [int((_energies(pair) > least).sum()) for pair in pairs]
                cut = [(up[:, :r], down[:r]) for (up, down), r in zip(pairs, ranks, strict=True)]
                ups, downs = zip(*cut, strict=True)
                up, down = even_out(torch.cat(ups, 1)[None], torch.cat(downs)[None])
                up, down = keep([up, down])
                started[index] = self._batch(index, tuple(ranks)), Factors(up, down)
            return started

        counter = part.counter("searching for a start", dict.fromkeys(members, 1.0))
        found: dict[int, tuple[FactoredBatch, Factors]] = {}
        for of_form in self.parallel(start, self._of_one_form(members)):
            found |= of_form
            for index in of_form:
                counter.finish(index)
        started = [found.pop(index) for index in members]
        used = [(batch, factors) for batch, factors in started if any(batch.ranks)]
        batches, factors = [batch for batch, _ in used], tuple(each for _, each in used)
        problem = Problem(tuple(batches), self.metric.energy(members), ridge=_RIDGE, keep=keep)
        return GroupSolution(name, problem, multipliers, factors, ())

    def swept(self, groups: list[GroupSolution], part: Progress) -> GroupSolution:
        """Takes the first of the groups out, and returns it after the sweeps."""
        group, factors = groups.pop(0).without_factors()
        batches = cast(tuple[FactoredBatch, ...], group.problem.batches)
        places = layers_of_one_form([batch.form for batch in batches])
        together = [SweptTogether.of([batches[place] for place in chosen]) for chosen in places]
        progress = SolverProgress(part)
        counting = progress.counting(self.parallel, len(together))
        inputs, layers = self._analysis.contrasts.count, len(self._analysis.layers)
        soon = min(_SWEEPS_TIMES_INPUTS // inputs, _SWEEPS_TIMES_LAYERS // layers)
        most = min(max(soon, _LEAST_SWEEPS), self.recipe.iterations)
        stopping = stop_by_sweep(replace(self.recipe, iterations=most), progress, 0.0)
        problem = replace(group.problem, batches=tuple(together), parallel=counting)
        alone = dict(enumerate(factors))
        start = deque(
            batch.padded([alone.pop(place) for place in chosen]).kept(problem.keep)
            for batch, chosen in zip(together, places, strict=True)
        )
        solution = solve_ll1(problem, given_away(start), group.multipliers, stopping)
        for batch, chosen, found in zip(together, places, solution.factors, strict=True):
            alone |= zip(chosen, batch.parts(found), strict=True)
        solution = replace(solution, factors=tuple(alone[place] for place in range(len(batches))))
        return GroupSolution.of(group.name, group.problem, solution)

    def _batch(self, index: int, ranks: tuple[int, ...]) -> FactoredBatch:
        part = self._analysis.part(index)
        most = max(int(_PER_COLUMN * max(part.core_shape)), _LEAST_COMPONENTS)
        places = slice(None) if len(part.owners) <= most else part.largest(most)
        owners = part.owners[places]
        factors = self._factors(index)[owners]

        def components() -> tuple[Tensor, Tensor]:
            ups, downs = part.components(places)
            return ups * factors, downs

        def slices() -> Tensor:
            return self.metric.core(index)[None]

        form = _form(part, owners)
        return FactoredBatch(slices, ranks, (index,), components, owners, form)

    def _factors(self, index: int) -> Tensor:  # (k,), float32
        """Returns by what each input's changes are multiplied so that squares are what the loss counts."""
        factors = torch.full((self._analysis.contrasts.count,), self.metric.layers[index].scale)
        if self.metric.mix is None:
            return factors.sqrt()
        return (
            factors.sqrt() * self.metric.mix.diagonal().float()
        )  # deviations from zero: all of it

    def _components(self, indices: Sequence[int]) -> Components:
        """Returns those of layers of one form."""
        ups, downs, owners = [], [], self._analysis.part(indices[0]).owners
        for index in indices:
            up, down = self._analysis.part(index).components()
            ups.append(up * self._factors(index)[owners])
            downs.append(down)
        return Components(torch.stack(ups), torch.stack(downs), owners)

    @property
    def _analysis(self) -> FactoredAnalysis:
        return cast(FactoredAnalysis, self.metric.analysis)

    def _of_one_form(self, members: Sequence[int]) -> list[list[int]]:
        """Returns layers of one form together, as many as are soon done."""
        parts = [self._analysis.part(index) for index in members]
        forms = [_form(part, part.owners) for part in parts]
        return [[members[place] for place in places] for places in layers_of_one_form(forms)]

    def _pairs(
        self, indices: Sequence[int], blocks: Sequence[StartBlock]
    ) -> list[list[FactorPair]]:
        """Returns the start of layers of one form."""
        mean = self.allowance.budget / sum(self.allowance.costs) / len(self.recipe.ranks)
        return start_pairs(self._components(indices), blocks, most_ranks(mean), indices[0])

    def price(
        self, groups: Mapping[str, Sequence[int]], blocks: Mapping[str, Sequence[StartBlock]]
    ) -> float:
        """Returns what the last byte gains where the start takes more bytes than the allowance has."""
        rates, costs = [], []
        for name, members in groups.items():
            sample = self._sample(members)
            times = sum(self.allowance.costs[i] for i in members) / sum(
                self.allowance.costs[i] for i in sample
            )
            pairs_of = partial(self._pairs, blocks=blocks[name])
            alone = [[index] for index in sample]
            for (index,), (pairs,) in zip(alone, self.parallel(pairs_of, alone), strict=True):
                cost = self.allowance.costs[index]
                gains = torch.cat([_energies(pair) for pair in pairs])
                rates.append(gains / cost)
                costs.append(torch.full_like(gains, times * cost))
        return last_rate(rates, costs, _OVERCOMPLETE * self.allowance.budget)

    def _price_of_private(self) -> float:
        """Returns what the last byte gains in private LoRAs."""
        pairs = list(zip(self.metric.spectra, self.allowance.costs, strict=True))
        rates = [layer.private.flatten() / cost for layer, cost in pairs]
        costs = [torch.full_like(rate, cost) for rate, (_, cost) in zip(rates, pairs, strict=True)]
        return last_rate(rates, costs, self.allowance.budget)

    def _sample(self, members: Sequence[int]) -> list[int]:
        return self.metric.representatives(members, _SAMPLE)

    def choose(self, members: Sequence[int]) -> list[StartBlock]:
        """Returns the blocks that promise most in a sample of the layers, those first that gain most."""
        count = len(self.recipe.ranks)
        gram = self.metric.slice_grams[list(members)].sum(0)
        sample, price = self._sample(members), self._price_of_private()
        groups = find_relatives(gram)
        best: dict[int, tuple[float, list[tuple[float, StartBlock]]]] = {}
        for turn in range(max(len(mixture_choices(len(relatives))) for relatives in groups)):
            tried = {}
            for place, relatives in enumerate(groups):
                choices = mixture_choices(len(relatives))
                if turn < len(choices):
                    tried[place] = relatives_blocks(gram, relatives, choices[turn])
            blocks = [block for of_group in tried.values() for block in of_group]
            values = iter(self._values(sample, blocks, price))
            for place, of_group in tried.items():
                pairs = [(next(values), block) for block in of_group]
                total = sum(value for value, _ in pairs)
                if place not in best or total > best[place][0]:
                    best[place] = total, pairs
        ranked = sorted(
            (pair for _, pairs in best.values() for pair in pairs), key=lambda pair: -pair[0]
        )
        ranked = ranked[:count]
        if 2 * count < len(gram):
            ranked = self._or_over_all(ranked, gram, sample, price)
        return [block for _, block in ranked]

    def _or_over_all(
        self,
        ranked: list[tuple[float, StartBlock]],
        gram: Tensor,
        sample: Sequence[int],
        price: float,
    ) -> list[tuple[float, StartBlock]]:
        """Returns as many blocks that mix all inputs, related or not, where they promise more."""
        everyone = list(range(len(gram)))
        blocks = relatives_blocks(gram, everyone, len(ranked))[: len(ranked)]
        values = self._values(sample, blocks, price)
        if sum(values) <= sum(value for value, _ in ranked):
            return ranked
        return sorted(zip(values, blocks, strict=True), key=lambda pair: -pair[0])

    def _values(
        self, sample: Sequence[int], blocks: Sequence[StartBlock], price: float
    ) -> list[float]:
        """Returns what each block explains in the sample, less the price of its bytes."""

        def values(index: int) -> Tensor:
            least = price * self.allowance.costs[index]
            return torch.stack(
                [
                    (_energies(pair) - least).clamp(min=0).sum()
                    for pair in self._pairs([index], blocks)[0]
                ]
            )

        return torch.stack(list(self.parallel(values, sample))).sum(0).tolist()


def _form(part: FactoredLayer, owners: Tensor) -> Form:
    return (*part.core_shape, tuple(owners.tolist()))


def _energies(pair: FactorPair) -> Tensor:  # (r,), float64
    up, down = pair
    return (up.square().sum(0) * down.square().sum(1)).double()
