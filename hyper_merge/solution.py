"""From an analysis and a list of ranks to blocks in the layers' own coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Final

import torch
from torch import Tensor

from hyper_merge.analysis_cache import Analysis, width_for
from hyper_merge.checkpoints.layers import Layer
from hyper_merge.control import Control
from hyper_merge.decomposition.contrasts import energies
from hyper_merge.decomposition.gauge import balanced, unit_scales
from hyper_merge.decomposition.greedy import solve_greedy
from hyper_merge.decomposition.ll1 import (
    Batch,
    Factors,
    Problem,
    Solution,
    Stopping,
    blocks,
    factors_from,
    solve,
)
from hyper_merge.decomposition.starts import best_start, search_cost
from hyper_merge.lora import as_hosts_add
from hyper_merge.recipe import Recipe
from hyper_merge.sources import Sources, bases_width
from hyper_merge.workers import Each, return_memory, workers

_SWEEPS_PER_RETURN: Final = 3  # of memory to the system
_LAYERS_PER_RETURN: Final = 50  # the same, when blocks are rounded
_BATCH_ENTRIES: Final = {"cpu": 2**19, "cuda": 2**28}  # of the cores in one batch

# For the progress: what is usual, and times the multiply-adds that small products take.
_USUAL_SWEEPS: Final = 12
_USUAL_STARTS: Final = 7
_START: Final = 1.2  # sweeps that a start in all layers takes
_GREEDY_SWEEPS: Final = 2  # that a block of greedy deflation takes
_GREEDY_MAPS: Final = 6  # over all layers for such a block
_IN_SWEEP: Final = 4.0
_IN_ROUNDING: Final = 6.5


@dataclass(frozen=True, eq=False)
class Rounded:
    """Blocks as the files will hold them, with all that multipliers and losses need."""

    factors: list[list[tuple[Tensor, Tensor]]]  # per layer and block: (m, r), (r, n)
    cross: Tensor  # (layers, d + 1, R), float64: <slices and the average's rounding error, block>
    gram: Tensor  # (layers, R, R), float64: <block, block>


def groups_of(layers: Sequence[Layer], *, separate: bool) -> dict[str, list[int]]:
    """The layers that share multipliers, by part; all of them are "unet" where nothing separates them."""
    if not separate or len({layer.part for layer in layers}) == 1:
        return {"unet": list(range(len(layers)))}
    groups: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        groups.setdefault(layer.part, []).append(index)
    return groups


def find_blocks(
    analysis: Analysis,
    recipe: Recipe,
    ranks: Sequence[tuple[int, ...]],  # per layer
    device: torch.device,
    control: Control,
) -> tuple[tuple[Batch, ...], Solution]:
    """Solves for blocks and multipliers on the cores; on the CPU where the device is too small."""
    course = _Course(control)
    try:
        return _find_blocks(analysis, recipe, ranks, device, course)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        control.warn(f"{device} has too little memory for the cores; the CPU takes them")
        return _find_blocks(analysis, recipe, ranks, torch.device("cpu"), course)


def solve_costs(
    sources: Sources,
    recipe: Recipe,
    ranks: Sequence[tuple[int, ...]],  # per layer
) -> tuple[float, float]:
    """What `find_blocks` and `rounded` take, nearly, in multiply-adds of large products."""
    width, slices = width_for(recipe.ranks), sources.contrasts.dimensions
    entries, sweep, rounding = 0.0, 0.0, 0.0
    for layer, rank in zip(sources.layout.layers, ranks, strict=True):
        p, q = bases_width(layer, width)
        entries += p * q
        sweep += p * q * (3 * sum(rank) + 2 * slices * len(rank))
        rounding += (layer.m * p + layer.n * q) * sum(rank)
    if recipe.method == "greedy":
        sweeps = float(_GREEDY_SWEEPS * len(recipe.ranks))
    else:
        sweeps = search_cost(entries, _USUAL_STARTS) + _START
        sweeps += min(recipe.iterations, _USUAL_SWEEPS)
    return sweeps * sweep * _IN_SWEEP, rounding * _IN_ROUNDING


def batches_of(
    analysis: Analysis,
    ranks: Sequence[tuple[int, ...]],  # per layer
    device: torch.device,
    check: Callable[[], None] = lambda: None,
) -> tuple[Batch, ...]:
    """The cores, stacked where shape and ranks agree, in pieces that fit a cache or a GPU.

    `check` is called before every batch; it may raise, to stop.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, rank in enumerate(ranks):
        groups.setdefault((*analysis.core(index).shape, rank), []).append(index)
    batches = []
    for indices in groups.values():
        size = analysis.core(indices[0]).numel()
        length = max(_BATCH_ENTRIES[device.type] // size, 1)
        for start in range(0, len(indices), length):
            check()
            part = tuple(indices[start : start + length])
            cores = [analysis.core(index) for index in part]
            # A single core stays where it is, mapped: on a CPU that saves most of the memory.
            stack = torch.stack(cores) if length > 1 else cores[0][None]
            batches.append(Batch(stack.to(device), ranks[part[0]], part))
    return tuple(batches)


def rounded(
    analysis: Analysis,
    batches: Sequence[Batch],
    solution: Solution,
    stored: tuple[Sequence[int | None], torch.dtype],  # ranks of the R files (their alphas), type
    control: Control,
) -> Rounded:
    """Blocks in the layers' coordinates, scaled, balanced and rounded as the files hold them.

    Each block is scaled so that its largest multiplier among the checkpoints is 1.
    """
    scales = unit_scales(analysis.contrasts.to_deviations @ solution.multipliers)
    jobs = [
        (batch, place, factors)
        for batch, factors in zip(batches, solution.factors, strict=True)
        for place in range(len(batch.layers))
    ]

    sizes = {index: layer.m + layer.n for index, layer in enumerate(analysis.layers)}
    tally = control.tally("preparing the LoRAs", sizes)

    def job(batch: Batch, place: int, factors: Factors) -> tuple[int, _RoundedLayer]:
        pairs = [(up[place].cpu(), down[place].cpu()) for up, down in blocks(batch, factors)]
        index = batch.layers[place]
        return index, _round_layer(analysis, index, pairs, scales, stored, control.check)

    layers: dict[int, _RoundedLayer] = {}
    with workers(torch.device("cpu"), control.check) as each:
        for index, layer in each(job, *zip(*jobs, strict=True)):
            layers[index] = layer
            tally.finish(index)
            if len(layers) % _LAYERS_PER_RETURN == 0:
                return_memory()
    ordered = [layers[index] for index in sorted(layers)]
    return Rounded(
        factors=[layer.factors for layer in ordered],
        cross=torch.stack([layer.cross for layer in ordered]),
        gram=torch.stack([layer.gram for layer in ordered]),
    )


@dataclass(frozen=True, eq=False)
class _RoundedLayer:
    factors: list[tuple[Tensor, Tensor]]  # per block (m, r), (r, n)
    cross: Tensor  # (d + 1, R)
    gram: Tensor  # (R, R)


class _Course:
    """Where the solve stands: between two places that are known it moves with every batch."""

    def __init__(self, control: Control) -> None:
        self.check = control.check
        self._step = control.step
        self._at = 0.0
        self.reach("", 0.0, 0.0)

    def reach(self, phase: str, at: float, end: float, left: float = 1.0) -> None:
        """Is at a fraction 0..1, never back; every map from now on takes 1 / left of the way to end."""
        self._phase, self._at = phase, max(at, self._at)
        self._end, self._left = max(end, self._at), left

    def counting(self, each: Each, batches: int) -> Each:
        """The same map, which tells of every batch that is done."""

        def counted(function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
            start, step = self._at, (self._end - self._at) / self._left
            for done, result in enumerate(each(function, *arguments), 1):
                self._at = start + step * done / batches
                self._step(self._phase, self._at)
                yield result

        return counted


def _find_blocks(
    analysis: Analysis,
    recipe: Recipe,
    ranks: Sequence[tuple[int, ...]],
    device: torch.device,
    course: _Course,
) -> tuple[tuple[Batch, ...], Solution]:
    batches = batches_of(analysis, ranks, device, course.check)
    energy = float(energies(analysis.grams, analysis.contrasts).sum())
    generator = torch.Generator().manual_seed(recipe.seed)
    with workers(device, course.check) as each:
        problem = Problem(batches, energy, course.counting(each, len(batches)))
        if recipe.method == "greedy":
            return batches, solve_greedy(problem, generator, _by_block(recipe, course))
        start, at = _start(problem, analysis, recipe, generator, course)
        return_memory()
        stopping = _by_sweep(recipe, course, at)
        # No name for the factors here, which would keep a set of them in memory for all sweeps.
        solution = solve(problem, factors_from(problem, start, generator), start, stopping)
    analysis.remember(recipe.ranks, solution.multipliers)
    return batches, solution


def _start(
    problem: Problem,
    analysis: Analysis,
    recipe: Recipe,
    generator: torch.Generator,
    course: _Course,
) -> tuple[Tensor, float]:  # (k, R), and the fraction at which the sweeps begin
    planned = [analysis.contrasts.to_deviations.mT]
    earlier = analysis.earlier_solutions(recipe.ranks)
    entries = sum(batch.slices[:, 0].numel() for batch in problem.batches)
    search = search_cost(entries, len(planned) + (len(earlier) or _USUAL_STARTS - 1))
    whole = search + _START + min(recipe.iterations, _USUAL_SWEEPS)

    def tell(fraction: float) -> None:
        at = (1 + (search - 1) * fraction) / whole
        course.reach("searching for a start", at, at)

    course.reach("searching for a start", 0.0, 1 / whole)  # to choose layers takes a sweep
    start = best_start(problem, planned, earlier, generator, tell)
    course.reach("solving for the LoRAs", search / whole, (search + _START) / whole)
    return start, (search + _START) / whole


def _by_sweep(recipe: Recipe, course: _Course, at: float) -> Stopping:
    losses: list[float] = []

    def on_sweep(loss: float) -> None:
        losses.append(loss)
        left = _sweeps_left(losses, recipe)
        course.reach("solving for the LoRAs", at, 1.0, left + 0.5)
        if len(losses) % _SWEEPS_PER_RETURN == 0:
            return_memory()

    course.reach("solving for the LoRAs", at, 1.0, _sweeps_left(losses, recipe) + 0.5)
    return Stopping(recipe.iterations, recipe.tolerance, on_sweep)


def _by_block(recipe: Recipe, course: _Course) -> Stopping:
    losses: list[float] = []

    def reach() -> None:
        at, end = (min(len(losses) + ahead, count) / count for ahead in (0, 1))
        course.reach("solving for the LoRAs", at, end, _GREEDY_MAPS)

    def on_block(loss: float) -> None:
        losses.append(loss)
        reach()

    count = len(recipe.ranks)
    reach()
    return Stopping(recipe.iterations, recipe.tolerance, on_block)


def _sweeps_left(losses: Sequence[float], recipe: Recipe) -> float:
    """How many sweeps will follow: the change from one to the next falls as powers of a number do."""
    lows = list(accumulate(losses, min))
    changes = [1 - after / before for before, after in pairwise(lows) if after < before]
    most = max(recipe.iterations - len(losses), 1)
    if len(changes) < 3 or changes[-1] >= changes[0]:
        return max(min(_USUAL_SWEEPS - len(losses), most), 1)
    rate = math.log(changes[0] / changes[-1]) / (len(changes) - 1)
    to_go = math.log(changes[-1] / max(recipe.tolerance, 1e-12)) / rate
    return max(min(to_go, most), 1)


def _round_layer(
    analysis: Analysis,
    index: int,
    pairs: Sequence[tuple[Tensor, Tensor]],  # per block (p, r), (r, q)
    scales: Tensor,  # (R,)
    stored: tuple[Sequence[int | None], torch.dtype],
    check: Callable[[], None],
) -> _RoundedLayer:
    layer, core = analysis.layers[index], analysis.core(index)
    left, right = analysis.bases(index)
    factors, products, ups, downs = [], [], [], []
    for pair, scale, alpha in zip(pairs, scales.tolist(), stored[0], strict=True):
        check()
        narrow_up, narrow_down = balanced(pair[0] * scale, pair[1])
        up, down = as_hosts_add(layer, left @ narrow_up, narrow_down @ right.mT, alpha, stored[1])
        products.append((_inside(left, up) @ _inside(right, down.mT).mT).flatten())
        ups.append(up)
        downs.append(down)
        factors.append((up.to(stored[1]), down.to(stored[1])))
    rows = torch.cat([core, analysis.rounding(index)[None]])
    cross = rows.flatten(1).double() @ torch.stack(products, 1).double()
    return _RoundedLayer(factors, cross, _block_gram(ups, downs))


def _inside(
    basis: Tensor,  # (m, p)
    factor: Tensor,  # (m, r)
) -> Tensor:  # (p, r)
    """The factor in the basis. That is rounded: one correction for its columns' inner products."""
    first = basis.mT @ factor
    return first + basis.mT @ (factor - basis @ first)


def _block_gram(ups: Sequence[Tensor], downs: Sequence[Tensor]) -> Tensor:  # (R, R)
    up, down = torch.cat(list(ups), 1), torch.cat(list(downs))
    columns = ((up.mT @ up) * (down @ down.mT)).double()
    sizes = torch.tensor([part.shape[1] for part in ups])
    member = torch.nn.functional.one_hot(
        torch.arange(len(ups)).repeat_interleave(sizes), len(ups)
    ).double()
    return member.mT @ columns @ member
