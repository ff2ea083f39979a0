"""What the phases of a job take: the time that is told beforehand, and the shares of the progress.

Costs are counted in one unit, a multiply-add of the pass's large products. The constants here and in
`analysis`, `solution` and `decomposition` were measured with four full-size files on two cores, where
a second does 1e11 of them; how many another machine does is measured there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import torch

from hyper_merge.analysis.cache import width_for
from hyper_merge.analysis.inputs import Sources
from hyper_merge.analysis.streaming_pass import Work, pass_costs
from hyper_merge.checkpoints.io.dtypes import DTYPES_BY_WORD
from hyper_merge.decomposition.rank_allocation import even_ranks
from hyper_merge.decomposition.truncated_svd import truncation_cost
from hyper_merge.loras.lora_file import lora_bytes
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runs.hash_cache import bytes_to_hash
from hyper_merge.runtime.throughput import seconds_of
from hyper_merge.solver.solve import solve_costs

_HASHED: Final = 120.0  # for each byte
_WRITTEN: Final = 200.0  # for each byte of the LoRAs: rounded, hashed, written and synchronised

_HOST: Final = torch.device("cpu")  # does what is no product of matrices, whatever the device


@dataclass(frozen=True)
class Existing:
    """Earlier work that a merge uses again."""

    cache: Path  # folder with the known hashes
    average: bool
    analysis: bool


class Costs(NamedTuple):
    """Seconds that each phase of a merge takes on this machine, nearly; 0 for what is there already."""

    hashing: float
    reading: float
    solving: float
    rounding: float
    writing: float


def merge_costs(
    sources: Sources,
    recipe: Recipe,
    ranks: Sequence[tuple[int, ...]],  # per layer
    device: torch.device,
    existing: Existing,
) -> Costs:
    """What a merge takes that uses the existing work; measures the machine the first time."""
    solving, rounding = solve_costs(sources, recipe, ranks)
    dtype = DTYPES_BY_WORD[recipe.factors_dtype]
    written = _WRITTEN * lora_bytes(sources.layout.layers, ranks, dtype, recipe.ranks)
    return Costs(
        hashing=_hashing(sources, existing.cache),
        reading=_reading(sources, recipe, device, existing),
        solving=seconds_of(solving, device),
        rounding=seconds_of(rounding, _HOST),
        writing=seconds_of(written, _HOST),
    )


def average_costs(sources: Sources, cache: Path) -> tuple[float, float]:
    """Seconds of hashing and of the pass over the files, for the average alone."""
    return _hashing(sources, cache), seconds_of(_entries(sources), _HOST)


def extraction_costs(
    sources: Sources, rank: int, cache: Path | None, device: torch.device
) -> tuple[float, float, float]:
    """Seconds of hashing, of the pass over both files, and of writing, for a LoRA from two checkpoints."""
    layers = sources.layout.layers
    products = sum(truncation_cost(layer.m, layer.n, rank) for layer in layers)
    ranks = even_ranks((rank,), [(layer.m, layer.n) for layer in layers])
    written = _WRITTEN * lora_bytes(layers, ranks, sources.dtype, (rank,))
    reading = seconds_of(_entries(sources), _HOST) + seconds_of(products, device)
    return _hashing(sources, cache), reading, seconds_of(written, _HOST)


def _hashing(sources: Sources, cache: Path | None) -> float:
    return seconds_of(_HASHED * bytes_to_hash(sources.read, cache), _HOST)


def _reading(sources: Sources, recipe: Recipe, device: torch.device, existing: Existing) -> float:
    if existing.average and existing.analysis:
        return 0.0
    entries = _entries(sources)
    if existing.analysis:
        return seconds_of(entries, _HOST)
    work = Work(device, recipe.seed, width_for(recipe.ranks))
    products = sum(pass_costs(sources, work).values()) - entries
    return seconds_of(entries, _HOST) + seconds_of(products, device)


def _entries(sources: Sources) -> float:
    return sum(pass_costs(sources, Work(_HOST)).values())
