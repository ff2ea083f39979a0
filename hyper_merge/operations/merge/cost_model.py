"""Estimates the costs of a merge's phases, for the expected time and the shares of the progress.

The unit of costs is a multiply-add of the pass's large products. The constants here and in
`analysis`, `solver` and `decomposition` lie between what was measured with four full-size files on two
machines of two cores, which differ by less in large products than in all else; the speed of another
machine is measured when it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import torch

from hyper_merge.analysis.cache import required_width
from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.analysis.streaming_pass import PassOptions, pass_costs
from hyper_merge.calibration.measure import measuring_cost
from hyper_merge.calibration.student import Course, training_cost
from hyper_merge.checkpoints.io.dtypes import DTYPES_BY_WORD
from hyper_merge.decomposition.rank_allocation import even_ranks
from hyper_merge.decomposition.truncated_svd import truncation_cost
from hyper_merge.loras.lora_file import lora_bytes
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runs.hash_cache import bytes_to_hash
from hyper_merge.runtime.throughput import estimate_seconds
from hyper_merge.solver.costs import solve_costs

HASHING_COST: Final = 70.0  # for each byte
# For each byte of the LoRAs, and for each LoRA: rounding, hashing, writing and synchronising.
_WRITING: Final = 500.0
_FILE: Final = 3e10

_HOST: Final = torch.device("cpu")  # does all work but products of matrices, for every device


@dataclass(frozen=True)
class ExistingFiles:
    """The earlier work that a merge uses again."""

    cache: Path  # folder with the known hashes
    average: bool  # whether the hyper-model exists
    analysis: bool  # whether the analysis exists
    sensitivities: bool = True  # whether those of the layers are known, or none are needed


class MergeCosts(NamedTuple):
    """Approximate seconds of each phase of a merge on this machine; 0 for what exists already."""

    hashing: float
    reading: float
    running: float  # of the average's network
    solving: float
    rounding: float
    training: float  # of the LoRAs, by runs of the network
    writing: float


def merge_costs(
    inputs: MergeInputs,
    recipe: Recipe,
    ranks: Sequence[tuple[int, ...]],  # per layer
    device: torch.device,
    existing: ExistingFiles,
    rounds: int,  # of a training
) -> MergeCosts:
    """Returns the costs of a merge that uses the existing work; measures the machine the first time."""
    solving, rounding = solve_costs(inputs, recipe, ranks)
    dtype = DTYPES_BY_WORD[recipe.factors_dtype]
    writing = _WRITING * lora_bytes(inputs.layout.layers, ranks, dtype, recipe.ranks)
    writing += _FILE * len(recipe.ranks)
    return MergeCosts(
        hashing=_hashing_seconds(inputs, existing.cache),
        reading=_reading_seconds(inputs, recipe, device, existing),
        running=_running_seconds(inputs, device, existing),
        solving=estimate_seconds(solving, device),
        rounding=estimate_seconds(rounding, _HOST),
        training=_training_seconds(inputs, ranks, device, rounds),
        writing=estimate_seconds(writing, _HOST),
    )


def average_costs(inputs: MergeInputs, cache: Path) -> tuple[float, float]:
    """Returns the seconds of hashing and of the pass over the files, for the average alone."""
    return _hashing_seconds(inputs, cache), estimate_seconds(_entry_costs(inputs), _HOST)


def extraction_costs(
    inputs: MergeInputs, rank: int, cache: Path | None, device: torch.device
) -> tuple[float, float, float]:
    """Returns the seconds of hashing, of the pass, and of writing, for a LoRA from two checkpoints."""
    layers = inputs.layout.layers
    products = sum(truncation_cost(layer.m, layer.n, rank) for layer in layers)
    ranks = even_ranks((rank,), [(layer.m, layer.n) for layer in layers])
    writing = _WRITING * lora_bytes(layers, ranks, inputs.dtype, (rank,))
    reading = estimate_seconds(_entry_costs(inputs), _HOST) + estimate_seconds(products, device)
    return _hashing_seconds(inputs, cache), reading, estimate_seconds(writing, _HOST)


def _hashing_seconds(inputs: MergeInputs, cache: Path | None) -> float:
    return estimate_seconds(HASHING_COST * bytes_to_hash(inputs.read, cache), _HOST)


def _reading_seconds(
    inputs: MergeInputs, recipe: Recipe, device: torch.device, existing: ExistingFiles
) -> float:
    if existing.average and existing.analysis:
        return 0.0
    entries = _entry_costs(inputs)
    if existing.analysis:
        return estimate_seconds(entries, _HOST)
    options = PassOptions(device, recipe.seed, required_width(recipe.ranks))
    products = sum(pass_costs(inputs, options).values()) - entries
    return estimate_seconds(entries, _HOST) + estimate_seconds(products, device)


def _running_seconds(inputs: MergeInputs, device: torch.device, existing: ExistingFiles) -> float:
    if existing.sensitivities:
        return 0.0
    return estimate_seconds(measuring_cost(inputs.layout), device)


def _training_seconds(
    inputs: MergeInputs, ranks: Sequence[tuple[int, ...]], device: torch.device, rounds: int
) -> float:
    if not rounds:
        return 0.0
    together = [sum(of_layer) for of_layer in ranks]
    cost = training_cost(inputs.layout, together, len(inputs.headers), Course(rounds))
    return estimate_seconds(cost, device)


def _entry_costs(inputs: MergeInputs) -> float:
    return sum(pass_costs(inputs, PassOptions(_HOST)).values())
