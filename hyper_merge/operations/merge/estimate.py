"""Estimates the time, the memory and the disk space of a merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from hyper_merge.analysis.cache import find_analysis, required_width
from hyper_merge.analysis.file_layout import analysis_bytes
from hyper_merge.analysis.inputs import MergeInputs, basis_columns
from hyper_merge.analysis.remote_pass import bytes_in_shards
from hyper_merge.analysis.sensitivities import sensitivities_bytes
from hyper_merge.loras.lora_file import lora_bytes
from hyper_merge.operations.merge.companions import vector_bytes
from hyper_merge.operations.merge.cost_model import ExistingFiles, MergeCosts, merge_costs
from hyper_merge.operations.merge.memory import tensors_in_flight
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.operations.merge.rank_plan import RankPlan, plan_ranks
from hyper_merge.runs.folders import Place
from hyper_merge.runtime.devices import resolve_device
from hyper_merge.runtime.disks import require_disks
from hyper_merge.solver.metric import COLUMNS_PER_RANK

_EVEN_SETS: Final = 2.2  # of factors that are kept during the solve
# Of the LoRAs in float32 with adaptive ranks, which gather where bases are as wide as the layers.
_ADAPTIVE_SETS: Final = 1.65
_ON_DISK: Final = (
    1.5  # times what the solver keeps: whole files, until a worker has done all of one
)


@dataclass(frozen=True)
class Estimate:
    """The bytes and the time that a merge will take."""

    average: int
    loras: int
    analysis: int  # the cache on disk
    memory: int  # at the peak, without mapped files
    seconds: float  # of the whole merge, with what the cache saves

    @property
    def disk(self) -> int:
        """Bytes of all files that are written."""
        return self.average + self.loras + self.analysis


def estimate_merge(preflight: Preflight) -> Estimate:
    """Returns what a merge will take; measures the machine's speed the first time."""
    inputs = preflight.inputs
    plan = plan_ranks(preflight.recipe, inputs)
    loras = _lora_bytes(preflight, plan)
    existing = _existing_files(preflight)
    limits, tensors = preflight.limits, None
    if not (existing.average and existing.analysis):
        tensors = tensors_in_flight(preflight.recipe, inputs, limits)
    kept = max(_solver_bytes(inputs, plan), loras)
    return Estimate(
        average=average_bytes(inputs),
        loras=loras,
        analysis=analysis_bytes(inputs, preflight.pass_options),
        memory=preflight.memory_needs.peak(limits, kept, tensors),
        seconds=sum(estimate_costs(preflight, existing)),
    )


def estimate_costs(preflight: Preflight, existing: ExistingFiles) -> MergeCosts:
    """Returns the seconds of the merge's phases, with what the existing files save."""
    recipe, inputs = preflight.recipe, preflight.inputs
    layer_ranks = plan_ranks(recipe, inputs).layer_ranks
    return merge_costs(
        inputs, recipe, layer_ranks, resolve_device(recipe.device), existing, preflight.rounds
    )


def average_bytes(inputs: MergeInputs) -> int:
    """Returns the bytes of the average's tensors; 0 where a given base takes its place."""
    return 0 if inputs.base else sum(info.nbytes for info in inputs.outputs().values())


def require_room(preflight: Preflight, place: Place, *, with_shards: bool = False) -> None:
    """Returns if the disks have room for what a merge will write in a place.

    Args:
        preflight: the validated recipe.
        place: of the merge's files.
        with_shards: whether workers write what they find and solve for to the cache's folder first.

    Raises:
        OutputError: too little is free.
    """
    inputs, folders = preflight.inputs, preflight.folders
    existing = _existing_files(preflight)
    cache = 0 if existing.analysis else analysis_bytes(inputs, preflight.pass_options)
    average = 0 if place.exists else average_bytes(inputs)
    plan = plan_ranks(preflight.recipe, inputs)
    if with_shards:
        # First those of the pass, then those of the solve, which only the CPU's workers take.
        solving = preflight.pass_options.device.type == "cpu"
        in_solve = int(_ON_DISK * _solver_bytes(inputs, plan)) if solving else 0
        cache += max(bytes_in_shards(cache + average), in_solve)
    if not existing.sensitivities:
        cache += sensitivities_bytes(inputs.layout.layers)
    require_disks(
        {
            place.loras: _lora_bytes(preflight, plan),
            place.hyper_model.parent: average,
            folders.cache: cache,
        }
    )


def _existing_files(preflight: Preflight) -> ExistingFiles:
    recipe, folders = preflight.recipe, preflight.folders
    analysis = find_analysis(folders.cache, preflight.inputs, preflight.pass_options, recipe.ranks)
    return ExistingFiles(
        folders.cache,
        average=folders.hyper_model_for(recipe, preflight.average_id) is not None,
        analysis=analysis is not None,
        sensitivities=preflight.is_network_known,
    )


def _lora_bytes(preflight: Preflight, plan: RankPlan) -> int:
    """Returns the bytes of all shared LoRAs and their companions."""
    layers = preflight.inputs.layout.layers
    loras = lora_bytes(layers, plan.layer_ranks, plan.dtype, plan.alphas)
    return loras + len(plan.recipe.ranks) * vector_bytes(preflight.norms_and_biases)


def _solver_bytes(inputs: MergeInputs, plan: RankPlan) -> int:
    """Returns the bytes that the solver holds: sets of factors, and narrow cores in float16.

    Wide cores are made from the mapped analysis when it is their turn.
    """
    if plan.allowance is None:
        return int(_EVEN_SETS * _factor_bytes(inputs, plan.recipe.ranks, plan.layer_ranks))
    layers, slices = inputs.layout.layers, inputs.contrasts.dimensions
    ranks = [sum(of_layer) for of_layer in plan.layer_ranks]
    factors = sum(4 * (x.m + x.n) * rank for x, rank in zip(layers, ranks, strict=True))
    sides = (
        basis_columns(x, int(COLUMNS_PER_RANK * r)) for x, r in zip(layers, ranks, strict=True)
    )
    return int(_ADAPTIVE_SETS * factors) + sum(2 * slices * p * q for p, q in sides)


def _factor_bytes(
    inputs: MergeInputs, ranks: Sequence[int], layer_ranks: Sequence[tuple[int, ...]]
) -> int:
    """Returns the bytes of all LoRAs' factors between the layers' bases, in float32."""
    width = required_width(ranks)
    sides = (sum(basis_columns(layer, width)) for layer in inputs.layout.layers)
    return sum(4 * side * sum(ranks) for side, ranks in zip(sides, layer_ranks, strict=True))
