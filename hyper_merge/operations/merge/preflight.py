"""Validates a recipe against its files, by their headers, before the first tensor is read."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from hyper_merge.analysis.cache import required_width
from hyper_merge.analysis.file_layout import file_identity
from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.analysis.sensitivities import Sensitivities, sensitivities_bytes
from hyper_merge.analysis.streaming_pass import PassOptions
from hyper_merge.checkpoints.architectures.detection import detect_family, require_supported
from hyper_merge.checkpoints.architectures.layout import Layout, Treatment, layout_of
from hyper_merge.checkpoints.architectures.norms_and_biases import NormOrBias
from hyper_merge.checkpoints.architectures.signatures import LABELS, UNET
from hyper_merge.checkpoints.architectures.spec import Family
from hyper_merge.checkpoints.compatibility import (
    check_compatible,
    check_distinct,
    check_families,
    find_differing_markers,
    find_missing_parts,
    find_mixed_strains,
    find_quantised,
)
from hyper_merge.checkpoints.io.downloads import require_downloaded, sign_of_download
from hyper_merge.checkpoints.io.dtypes import DTYPES_BY_WORD, FLOAT8
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.checkpoints.prediction_type import with_prediction_type
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import MismatchError, RecipeError
from hyper_merge.operations.merge.companions import select_norms_and_biases
from hyper_merge.operations.merge.file_overhead import FileOverhead
from hyper_merge.operations.merge.memory import (
    USUAL_LIMITS,
    MemoryLimits,
    MemoryNeeds,
    memory_needs,
)
from hyper_merge.operations.merge.training_rounds import training_rounds
from hyper_merge.operations.sensitivities import AverageNetwork, is_run
from hyper_merge.recipe.default_ranks import default_ranks
from hyper_merge.recipe.parsing import LARGEST_RANK
from hyper_merge.recipe.recipe import AVERAGE, Recipe
from hyper_merge.runs.folders import Folders, Place
from hyper_merge.runs.report import EndLayers
from hyper_merge.runtime.devices import resolve_device
from hyper_merge.runtime.formatting import format_size

# Share of the differences that a target may ask of LoRAs in 8 bits, whose rounding loses a tenth of a
# percent and more.
_MOST_IN_8_BITS: Final = 0.98


@dataclass(frozen=True)
class Preflight:
    """A recipe that was validated against its files; nothing is written yet."""

    recipe: Recipe
    inputs: MergeInputs
    warnings: tuple[str, ...]
    folders: Folders  # of everything that the merge writes and of earlier work that it uses again
    limits: MemoryLimits = USUAL_LIMITS  # of its memory, from the ranks that are known beforehand
    ends: EndLayers | None = None  # known with the analysis; where not carried, no layers any more
    rounds: int = 0  # of the training; 0 for none

    @cached_property
    def norms_and_biases(self) -> tuple[NormOrBias, ...]:
        """The tensors that the LoRAs' companions hold."""
        return select_norms_and_biases(self.recipe, self.inputs)

    @cached_property
    def pass_options(self) -> PassOptions:
        """The options of the pass over the files."""
        recipe = self.recipe
        return PassOptions(
            resolve_device(recipe.device),
            recipe.seed,
            required_width(recipe.ranks),
            in_flight=self.limits.in_flight,
        )

    @cached_property
    def memory_needs(self) -> MemoryNeeds:
        """What the merge takes of the memory."""
        recipe, inputs = self.recipe, self.inputs
        # Not by `network`, whose average's id takes a look at every file.
        runs = is_run(recipe.layer_weights, inputs.base or inputs.headers[0], inputs.layout)
        sensitivities = sensitivities_bytes(inputs.layout.layers) if runs else 0
        return memory_needs(recipe, inputs, sensitivities, trains=self.rounds > 0)

    @cached_property
    def average_id(self) -> str:
        """An id of the average: equal for equal files, weights, VAE policy and type."""
        inputs = self.inputs
        identity = [
            [file_identity(header) for header in inputs.read],
            inputs.base is not None,
            inputs.contrasts.base_weights.tolist(),
            inputs.average_vae,
            str(inputs.dtype),
            *(["accepts damaged"] if inputs.accepts_damaged else []),
            *([inputs.block_weights] if inputs.block_weights else []),
        ]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    @cached_property
    def network(self) -> AverageNetwork | None:
        """The average's network, if the recipe asks for runs of it."""
        recipe, inputs = self.recipe, self.inputs
        header = inputs.base or inputs.headers[0]
        return AverageNetwork.of(
            recipe.layer_weights,
            header,
            inputs.layout,
            self.average_id,
            self.folders.cache,
            recipe.seed,
        )

    @property
    def is_network_known(self) -> bool:
        """Whether the average need not run: an earlier merge did, or the recipe asks for no run."""
        return self.network is None or self.network.is_known

    @property
    def known_sensitivities(self) -> Sensitivities | None:
        """The sensitivities that an earlier merge measured, if any."""
        return None if self.network is None else self.network.known()

    def find_place(self) -> Place:
        """Returns where the merge's files go.

        Raises:
            OutputError: the recipe's name is taken.
        """
        return self.folders.place(self.recipe, self.average_id)


def run_preflight(recipe: Recipe, folders: Folders | None = None) -> Preflight:
    """Validates a recipe against its files, by their headers.

    Args:
        recipe: the settings of the merge.
        folders: where the files go and where earlier work is; None for those of the recipe's output
            folder.

    Raises:
        CheckpointError: a file is missing, damaged, not a checkpoint, or does not match
            the others.
        DeviceError: the device is absent.
        RecipeError: a setting does not go with these checkpoints.
    """
    resolve_device(recipe.device)
    headers = [read_header(path) for path in recipe.models]
    base = None if recipe.base == AVERAGE else read_header(recipe.base)
    accepts_damaged = recipe.damaged == "accept"
    files = [*headers, base] if base else headers
    layout = common_layout(files, accepts_damaged=accepts_damaged)
    warnings = check_distinct(headers)
    warnings += find_unfinished(files) if accepts_damaged else []
    check_stems(headers)
    count = len(headers)
    recipe = with_lora_dtype(recipe, layout.family)
    inputs = MergeInputs(
        headers=tuple(headers),
        base=base,
        layout=layout,
        weights=recipe.weights or (1.0,) * count,
        dtype=DTYPES_BY_WORD[recipe.dtype],
        average_vae=recipe.vae == "average",
        block_weights=recipe.block_weights,
        accepts_damaged=accepts_damaged,
    )
    _check_blocks(inputs)
    select_norms_and_biases(recipe, inputs)
    recipe = with_ranks(recipe, inputs)
    warnings += [
        *find_quantised(files),
        *find_missing_parts(headers[0], layout),
        *find_differing_markers(headers),
        *find_mixed_strains(headers, layout.family),
        *_find_capped_ranks(recipe, inputs),
    ]
    rounds = training_rounds(recipe, inputs, resolve_device(recipe.device))
    preflight = Preflight(
        recipe, inputs, tuple(warnings), folders or Folders.under(recipe.output), rounds=rounds
    )
    return _within_memory(preflight)


def _within_memory(preflight: Preflight) -> Preflight:
    """Returns the preflight with the limits of its memory.

    Where these are too narrow for a training whose rounds were left open, there is none.

    Raises:
        RecipeError: they are too narrow for all else too.
    """
    memory = preflight.recipe.memory
    is_free = preflight.recipe.training == "auto"
    if memory is not None and is_free and memory < preflight.memory_needs.least:
        preflight = replace(preflight, rounds=0)
    return replace(preflight, limits=preflight.memory_needs.limits(memory))


def _check_blocks(inputs: MergeInputs) -> None:
    """Returns if weights by block suit the network, and every block has a checkpoint that counts.

    Raises:
        RecipeError: they do not; before the first tensor is read.
    """
    if inputs.block_weights is None:
        return
    if inputs.base:
        raise RecipeError(
            f"the weights by block are of an average, and the base is {inputs.base.name}",
            hint="leave one of both out",
            key="block_weights",
        )
    family = inputs.layout.family
    blocks = {len(weights) for weights in inputs.block_weights} - {1}
    is_xl = any(key.startswith(LABELS) for key in inputs.layout.treatments)
    suitable = {20} if is_xl else {26}
    if not any(key.startswith(f"{UNET}input_blocks.") for key in inputs.layout.treatments):
        raise RecipeError(
            f"{family.title} has no blocks of a UNet",
            hint="leave the weights by block out",
            key="block_weights",
        )
    if blocks - suitable:
        raise RecipeError(
            f"{family.title} has {suitable.pop()} blocks, got weights for {blocks.pop()}",
            key="block_weights",
        )
    for key, treatment in inputs.layout.treatments.items():
        if treatment in (Treatment.LAYER, Treatment.AVERAGE):
            inputs.contrasts_of(key)


def common_layout(headers: Sequence[Header], *, accepts_damaged: bool = False) -> Layout:
    """Returns the layout that all files have in common.

    Args:
        headers: those of the files.
        accepts_damaged: whether files may be among them that are still being downloaded.

    Raises:
        CheckpointError: a file is still being downloaded, is not a checkpoint that can be merged,
            or does not match the others.
    """
    for header in headers if not accepts_damaged else ():
        require_downloaded(header.path)
    families = [with_prediction_type(header, detect_family(header)) for header in headers]
    check_families(headers, families)
    for header in headers:
        require_supported(header)
    layouts = [layout_of(*pair) for pair in zip(headers, families, strict=True)]
    check_compatible(headers, layouts)
    return layouts[0]


def find_unfinished(headers: Sequence[Header]) -> list[str]:
    """Returns a warning for each file that is still being downloaded by what stands beside it."""
    signs = [(header, sign_of_download(header.path)) for header in headers]
    return [
        f"the download of {header.name} is not finished: {sign.name} stands beside it"
        for header, sign in signs
        if sign
    ]


def with_ranks(recipe: Recipe, inputs: MergeInputs) -> Recipe:
    """Returns the recipe with ranks for all estimates where the merge will search for its ranks."""
    if not recipe.finds_ranks:
        return recipe
    if recipe.budget is None:
        return replace(recipe, ranks=default_ranks(len(recipe.models)))
    size = DTYPES_BY_WORD[recipe.factors_dtype].itemsize
    rank_bytes = sum((layer.m + layer.n) * size for layer in inputs.layout.layers)
    least = least_bytes(recipe, inputs)
    if recipe.budget < least:
        raise RecipeError(
            f"the budget of {format_size(recipe.budget)} is too small: a LoRA of rank 1 takes"
            f" {format_size(least)} for these checkpoints",
            hint=f"give {format_size(least)} or more",
        )
    return replace(recipe, ranks=(min(recipe.budget // rank_bytes, LARGEST_RANK),))


def least_bytes(recipe: Recipe, inputs: MergeInputs) -> int:
    """Returns the bytes of one LoRA of rank 1 with its companion, all files together."""
    overhead = FileOverhead.of(recipe, inputs, select_norms_and_biases(recipe, inputs))
    layers = inputs.layout.layers
    (layout,) = overhead.formats((1,))
    return layout.size(layers, [1] * len(layers)) + overhead.companions((1,))


def with_lora_dtype(recipe: Recipe, family: Family) -> Recipe:
    """Returns the recipe with the type of the LoRAs decided: 8 bits where they load and lose little.

    Raises:
        RecipeError: float8 for a family without alphas, which bring factors into its range.
    """
    if recipe.lora_dtype == "auto":
        in_8_bits = (
            family.lora_alpha
            and recipe.dtype != "float32"
            and (recipe.target or 0.0) <= _MOST_IN_8_BITS
            and sys.platform != "darwin"  # Apple's GPUs do not know the type
        )
        return replace(recipe, lora_dtype="float8" if in_8_bits else "same")
    if DTYPES_BY_WORD[recipe.factors_dtype] is FLOAT8 and not family.lora_alpha:
        raise RecipeError(
            f"lora_dtype float8 needs LoRA files with alphas, and those of {family.title} hold"
            " none",
            hint="choose float16 or bfloat16",
        )
    return recipe


def check_stems(headers: Sequence[Header]) -> None:
    """Refuses files of one name: multipliers are listed by file name without suffix."""
    stems: dict[str, Header] = {}
    for header in headers:
        other = stems.setdefault(header.stem, header)
        if other is not header:
            raise MismatchError(
                f"{other.path} and {header.path} have the same name {header.stem!r}, by which"
                " multipliers are listed",
                hint="rename one of them",
            )


def _find_capped_ranks(recipe: Recipe, inputs: MergeInputs) -> list[str]:
    """Returns a warning where layers are too small for an even rank, else none."""
    sides = [min(layer.m, layer.n) for layer in inputs.layout.layers if not layer.is_end]
    smallest = min(sides)
    if recipe.allocation == "adaptive" or max(recipe.ranks) <= smallest:
        return []
    affected = sum(side < max(recipe.ranks) for side in sides)
    return [f"rank {max(recipe.ranks)} is capped in {affected} layers, the smallest has {smallest}"]
