"""What can be known before the first tensor is read: from headers, folders and the machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import torch

from hyper_merge.analysis.cache import find_analysis, required_width
from hyper_merge.analysis.inputs import MergeInputs, basis_columns, multiplier_groups
from hyper_merge.analysis.store import analysis_bytes, file_identity
from hyper_merge.analysis.streaming_pass import PassOptions
from hyper_merge.checkpoints.architectures.detection import detect_family, require_supported
from hyper_merge.checkpoints.architectures.layout import Layer, Layout, layout_of
from hyper_merge.checkpoints.architectures.norms_and_biases import NormOrBias
from hyper_merge.checkpoints.architectures.spec import Family
from hyper_merge.checkpoints.compatibility import (
    check_compatible,
    check_distinct,
    check_families,
    find_differing_markers,
    find_missing_parts,
)
from hyper_merge.checkpoints.io.dtypes import DTYPES_BY_WORD, FLOAT8
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.checkpoints.prediction_type import with_prediction_type
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.decomposition.rank_allocation import even_ranks
from hyper_merge.errors import MismatchError, RecipeError
from hyper_merge.loras.lora_file import lora_bytes
from hyper_merge.operations.merge.companions import companion_bytes, select_norms_and_biases
from hyper_merge.operations.merge.cost_model import ExistingFiles, MergeCosts, merge_costs
from hyper_merge.recipe.parsing import LARGEST_RANK
from hyper_merge.recipe.recipe import AVERAGE, DEFAULT_RANKS, Recipe
from hyper_merge.runs.folders import Folders, Place
from hyper_merge.runtime.devices import resolve_device
from hyper_merge.runtime.disks import require_disks
from hyper_merge.runtime.formatting import format_size
from hyper_merge.solver.rank_pruning import Allowance

_AT_ONCE: Final = 2  # layers in the pass
_SETS: Final = 5  # of factors during the solve: two, and the rest in the allocator's holes
_HEADER_BYTES: Final = 340  # of a layer's three tensors in a file, without their names
_METADATA_BYTES: Final = 600  # that a file says of a checkpoint
_OVERHEAD: Final = 400 * 2**20  # bytes: Python, torch, and what is in flight


@dataclass(frozen=True)
class Estimate:
    """What a merge will take: bytes, and time."""

    average: int
    loras: int
    analysis: int  # the cache on disk
    memory: int  # at the peak, without mapped files
    seconds: float  # of the whole merge, with what the cache saves

    @property
    def disk(self) -> int:
        """All that is written."""
        return self.average + self.loras + self.analysis


@dataclass(frozen=True)
class Preflight:
    """A recipe that has been held against its files; nothing is written yet."""

    recipe: Recipe
    inputs: MergeInputs
    warnings: tuple[str, ...]
    folders: Folders  # where earlier work may lie that can be used again
    budget: int | None = None  # bytes of all factors, where a target asks for them

    def with_ranks(self, ranks: tuple[int, ...], budget: int | None = None) -> Preflight:
        """The same with the ranks, and for a target the bytes, that the merge has found."""
        return replace(self, recipe=replace(self.recipe, ranks=ranks), budget=budget)

    @cached_property
    def ranks(self) -> list[tuple[int, ...]]:
        """Of the blocks, per layer."""
        layers = self.inputs.layout.layers
        return even_ranks(self.recipe.ranks, [(layer.m, layer.n) for layer in layers])

    @cached_property
    def groups(self) -> dict[str, list[int]]:
        """The layers that share multipliers."""
        separate = self.recipe.multipliers == "separate"
        return multiplier_groups(self.inputs.layout.layers, separate=separate)

    @property
    def lora_dtype(self) -> torch.dtype:
        """Of the LoRAs' factors."""
        return DTYPES_BY_WORD[self.recipe.factors_dtype]

    @property
    def alphas(self) -> tuple[int | None, ...]:
        """Of the LoRA files; those of float8 files are found with their factors."""
        ranks = self.recipe.ranks
        return ranks if self.inputs.layout.family.lora_alpha else (None,) * len(ranks)

    @cached_property
    def allowance(self) -> Allowance | None:
        """The bytes of the even ranks, to be spread over the layers; None where they stay even."""
        recipe, layers = self.recipe, self.inputs.layout.layers
        if recipe.allocation == "even" or recipe.method == "greedy":
            return None
        costs = self.rank_bytes
        budget = sum(cost * sum(rank) for cost, rank in zip(costs, self.ranks, strict=True))
        if self.budget is not None:
            budget = self.budget
        elif recipe.budget is not None:
            budget = recipe.budget - self._bytes_beside_factors
        return Allowance(costs, budget - len(recipe.ranks) * _zeros_of_groups(layers, costs))

    @cached_property
    def rank_bytes(self) -> tuple[int, ...]:
        """What a rank takes in each layer."""
        size = self.lora_dtype.itemsize
        return tuple((layer.m + layer.n) * size for layer in self.inputs.layout.layers)

    @property
    def _bytes_beside_factors(self) -> int:
        """Of all LoRA files at most: headers, which name every tensor, and what they say of themselves."""
        names = sum(len(layer.module) for layer in self.inputs.layout.layers)
        of_layers = _HEADER_BYTES * len(self.inputs.layout.layers) + 3 * names
        of_checkpoints = _METADATA_BYTES * (len(self.inputs.read) + 8)
        return len(self.recipe.ranks) * (of_layers + of_checkpoints)

    @cached_property
    def vectors(self) -> tuple[NormOrBias, ...]:
        """What the LoRAs' companions hold."""
        return select_norms_and_biases(self.recipe, self.inputs)

    @cached_property
    def pass_options(self) -> PassOptions:
        """What the pass over the files is to find."""
        recipe = self.recipe
        return PassOptions(resolve_device(recipe.device), recipe.seed, required_width(recipe.ranks))

    @cached_property
    def average_id(self) -> str:
        """Tells the same average: equal for equal files, weights, VAE policy and type."""
        inputs = self.inputs
        what = [
            [file_identity(header) for header in inputs.read],
            inputs.base is not None,
            inputs.contrasts.base_weights.tolist(),
            inputs.average_vae,
            str(inputs.dtype),
        ]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    @cached_property
    def estimate(self) -> Estimate:
        """Sizes of files and memory, and the time to expect."""
        inputs, recipe = self.inputs, self.recipe
        average = 0 if inputs.base else sum(info.nbytes for info in inputs.outputs().values())
        loras = lora_bytes(inputs.layout.layers, self.ranks, self.lora_dtype, self.alphas)
        loras += len(recipe.ranks) * companion_bytes(self.vectors)
        analysis = analysis_bytes(inputs, self.pass_options)
        largest = max(layer.m * layer.n for layer in inputs.layout.layers) * 4
        in_flight = _AT_ONCE * (len(inputs.headers) + 4) * largest
        memory = _OVERHEAD + max(in_flight, _SETS * self._factors(), 2 * loras)
        return Estimate(average, loras, analysis, memory, sum(self.costs(self._existing())))

    def require_room(self, place: Place) -> None:
        """Returns if the disks have room for what will be written in a place.

        Raises:
            OutputError: too little is free.
        """
        existing, estimate = self._existing(), self.estimate
        require_disks(
            {
                place.loras: estimate.loras,
                place.hyper_model.parent: 0 if place.exists else estimate.average,
                self.folders.cache: 0 if existing.analysis else estimate.analysis,
            }
        )

    def costs(self, existing: ExistingFiles) -> MergeCosts:
        """Seconds of the merge's phases, with what the existing work saves."""
        device = resolve_device(self.recipe.device)
        return merge_costs(self.inputs, self.recipe, self.ranks, device, existing)

    def _existing(self) -> ExistingFiles:
        recipe, folders = self.recipe, self.folders
        return ExistingFiles(
            folders.cache,
            average=folders.hyper_model_for(recipe, self.average_id) is not None,
            analysis=find_analysis(folders.cache, self.inputs, self.pass_options, recipe.ranks)
            is not None,
        )

    def _factors(self) -> int:
        """Bytes of all blocks between the bases, in float32."""
        width = required_width(self.recipe.ranks)
        sides = (sum(basis_columns(layer, width)) for layer in self.inputs.layout.layers)
        return sum(4 * side * sum(ranks) for side, ranks in zip(sides, self.ranks, strict=True))


def run_preflight(recipe: Recipe, folders: Folders | None = None) -> Preflight:
    """Holds a recipe against its files, by their headers.

    Args:
        recipe: what is to be merged.
        folders: where earlier work is looked for; None for those of the recipe's output folder.

    Raises:
        CheckpointError: a file is missing, damaged, not a checkpoint, or unlike the others.
        DeviceError: the device is absent.
        RecipeError: a setting does not go with these checkpoints.
    """
    resolve_device(recipe.device)
    headers = [read_header(path) for path in recipe.models]
    base = None if recipe.base == AVERAGE else read_header(recipe.base)
    layout = common_layout([*headers, base] if base else headers)
    warnings = check_distinct([header.path for header in headers])
    _check_stems(headers)
    count = len(headers)
    _check_alphas(recipe, layout.family)
    recipe = _with_ranks(recipe, layout.layers)
    inputs = MergeInputs(
        headers=tuple(headers),
        base=base,
        layout=layout,
        weights=recipe.weights or (1.0,) * count,
        dtype=DTYPES_BY_WORD[recipe.dtype],
        average_vae=recipe.vae == "average",
    )
    select_norms_and_biases(recipe, inputs)
    warnings += [
        *find_missing_parts(headers[0], layout),
        *find_differing_markers(headers),
        *_capped(recipe, inputs),
    ]
    return Preflight(recipe, inputs, tuple(warnings), folders or Folders.under(recipe.output))


def common_layout(headers: Sequence[Header]) -> Layout:
    """The layout of files that go together.

    Raises:
        CheckpointError: a file is not a checkpoint that can be merged, or unlike the others.
    """
    families = [with_prediction_type(header, detect_family(header)) for header in headers]
    check_families(headers, families)
    for header in headers:
        require_supported(header)
    layouts = [layout_of(*pair) for pair in zip(headers, families, strict=True)]
    check_compatible(headers, layouts)
    return layouts[0]


def _zeros_of_groups(layers: Sequence[Layer], costs: Sequence[int]) -> int:
    """Bytes of rank 1 in all layers that a file has together or not at all: at most so many zeros."""
    return sum(cost for layer, cost in zip(layers, costs, strict=True) if layer.bundle)


def _with_ranks(recipe: Recipe, layers: Sequence[Layer]) -> Recipe:
    """The recipe with ranks that stand for those that the merge will find, for all estimates."""
    if not recipe.finds_ranks:
        return recipe
    if recipe.budget is None:
        return replace(recipe, ranks=DEFAULT_RANKS)
    size = DTYPES_BY_WORD[recipe.factors_dtype].itemsize
    of_one = sum((layer.m + layer.n) * size for layer in layers)
    if recipe.budget < 2 * of_one:
        raise RecipeError(
            f"the budget of {format_size(recipe.budget)} is too small: a LoRA of rank 1 takes"
            f" {format_size(of_one)} for these checkpoints",
            hint=f"give {format_size(2 * of_one)} or more",
        )
    return replace(recipe, ranks=(min(recipe.budget // of_one, LARGEST_RANK),))


def _check_alphas(recipe: Recipe, family: Family) -> None:
    """Factors get into the range of float8 by their file's alpha."""
    if DTYPES_BY_WORD[recipe.factors_dtype] is FLOAT8 and not family.lora_alpha:
        raise RecipeError(
            f"lora_dtype float8 needs LoRA files with alphas, and those of {family.title} hold"
            " none",
            hint="choose float16 or bfloat16",
        )


def _check_stems(headers: Sequence[Header]) -> None:
    """Multipliers are listed by file name without suffix: two alike would be one."""
    stems: dict[str, Header] = {}
    for header in headers:
        other = stems.setdefault(header.stem, header)
        if other is not header:
            raise MismatchError(
                f"{other.path} and {header.path} have the same name {header.stem!r}, by which"
                " multipliers are listed",
                hint="rename one of them",
            )


def _capped(recipe: Recipe, inputs: MergeInputs) -> list[str]:
    smallest = min(min(layer.m, layer.n) for layer in inputs.layout.layers)
    if recipe.allocation == "adaptive" or max(recipe.ranks) <= smallest:
        return []
    affected = sum(min(layer.m, layer.n) < max(recipe.ranks) for layer in inputs.layout.layers)
    return [f"rank {max(recipe.ranks)} is capped in {affected} layers, the smallest has {smallest}"]
