"""From an analysis and a list of ranks to blocks in the layers' own coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hyper_merge.analysis_cache import Analysis
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
from hyper_merge.decomposition.starts import best_start
from hyper_merge.lora import as_hosts_add
from hyper_merge.recipe import Recipe
from hyper_merge.workers import return_memory, workers

_SWEEPS_PER_RETURN: Final = 3  # of memory to the system
_BATCH_ENTRIES: Final = {"cpu": 2**19, "cuda": 2**28}  # of the cores in one batch


@dataclass(frozen=True, eq=False)
class Rounded:
    """Blocks as the files will hold them, with all that multipliers and losses need."""

    factors: list[list[tuple[Tensor, Tensor]]]  # per layer and block: (m, r), (r, n)
    cross: Tensor  # (layers, d + 1, R), float64: <slices and the average's rounding error, block>
    gram: Tensor  # (layers, R, R), float64: <block, block>


def find_blocks(
    analysis: Analysis,
    recipe: Recipe,
    ranks: Sequence[tuple[int, ...]],  # per layer
    device: torch.device,
    control: Control,
) -> tuple[tuple[Batch, ...], Solution]:
    """Solves for blocks and multipliers on the cores; on the CPU where the device is too small."""
    try:
        return _find_blocks(analysis, recipe, ranks, device, control)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        control.warn(f"{device} has too little memory for the cores; the CPU takes them")
        return _find_blocks(analysis, recipe, ranks, torch.device("cpu"), control)


def batches_of(
    analysis: Analysis, ranks: Sequence[tuple[int, ...]], device: torch.device
) -> tuple[Batch, ...]:
    """The cores, stacked where shape and ranks agree, in pieces that fit a cache or a GPU."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, rank in enumerate(ranks):
        groups.setdefault((*analysis.core(index).shape, rank), []).append(index)
    batches = []
    for indices in groups.values():
        size = analysis.core(indices[0]).numel()
        length = max(_BATCH_ENTRIES[device.type] // size, 1)
        for start in range(0, len(indices), length):
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

    def job(batch: Batch, place: int, factors: Factors) -> tuple[int, _RoundedLayer]:
        pairs = [(up[place].cpu(), down[place].cpu()) for up, down in blocks(batch, factors)]
        index = batch.layers[place]
        return index, _round_layer(analysis, index, pairs, scales, stored)

    layers: dict[int, _RoundedLayer] = {}
    with workers(torch.device("cpu")) as each:
        for index, layer in each(job, *zip(*jobs, strict=True)):
            layers[index] = layer
            control.step("preparing the LoRAs", len(layers) / len(jobs))
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


def _find_blocks(
    analysis: Analysis,
    recipe: Recipe,
    ranks: Sequence[tuple[int, ...]],
    device: torch.device,
    control: Control,
) -> tuple[tuple[Batch, ...], Solution]:
    batches = batches_of(analysis, ranks, device)
    energy = float(energies(analysis.grams, analysis.contrasts).sum())
    generator = torch.Generator().manual_seed(recipe.seed)
    sweeps: list[float] = []

    def on_sweep(loss: float) -> None:
        sweeps.append(loss)
        control.step("solving for the LoRAs", min(0.3 + 0.7 * len(sweeps) / recipe.iterations, 1.0))
        if len(sweeps) % _SWEEPS_PER_RETURN == 0:
            return_memory()

    stopping = Stopping(recipe.iterations, recipe.tolerance, on_sweep)
    with workers(device) as each:
        problem = Problem(batches, energy, each)
        if recipe.method == "greedy":
            return batches, solve_greedy(problem, generator, stopping)
        control.step("searching for a start", 0.0)
        start = best_start(
            problem,
            [analysis.contrasts.to_deviations.mT],
            analysis.earlier_solutions(recipe.ranks),
            generator,
            lambda: control.step("searching for a start", 0.1),
        )
        return_memory()
        factors = factors_from(problem, start, generator)
        solution = solve(problem, factors, start, stopping)
    analysis.remember(recipe.ranks, solution.multipliers)
    return batches, solution


def _round_layer(
    analysis: Analysis,
    index: int,
    pairs: Sequence[tuple[Tensor, Tensor]],  # per block (p, r), (r, q)
    scales: Tensor,  # (R,)
    stored: tuple[Sequence[int | None], torch.dtype],
) -> _RoundedLayer:
    layer, core = analysis.layers[index], analysis.core(index)
    left, right = analysis.bases(index)
    factors, products, ups, downs = [], [], [], []
    for pair, scale, alpha in zip(pairs, scales.tolist(), stored[0], strict=True):
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
