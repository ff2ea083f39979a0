"""Extracts the LoRA that turns one checkpoint into another."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch

from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.analysis.streaming_pass import PassOptions
from hyper_merge.checkpoints.compatibility import check_distinct, find_quantised
from hyper_merge.checkpoints.io.transaction import FileTransaction, require_free
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.decomposition.rank_allocation import even_ranks
from hyper_merge.errors import ExtractionError, NameTakenError, RecipeError, settings_placed
from hyper_merge.loras.cards import CARD_SUFFIXES
from hyper_merge.loras.lora_file import lora_bytes, write_lora
from hyper_merge.loras.metadata import (
    KIND,
    RECIPE,
    STANDALONE_KIND,
    Lineage,
    LoraFile,
    SourceRecord,
)
from hyper_merge.operations.extract.difference import LowRankDifference, find_difference
from hyper_merge.operations.merge.cost_model import extraction_costs
from hyper_merge.operations.merge.preflight import common_layout, find_unfinished
from hyper_merge.recipe.fields import FIELD_PARSERS
from hyper_merge.recipe.parsing import LARGEST_RANK, optional, parse_name, parse_path, whole
from hyper_merge.recipe.request import Parsers, Request, key_place
from hyper_merge.runs.folders import Folders, metadata_of, require_no_source
from hyper_merge.runs.hash_cache import current_time, hash_sources
from hyper_merge.runs.report import PARTS
from hyper_merge.runtime.checked_json import parse_json
from hyper_merge.runtime.devices import device_job, resolve_device
from hyper_merge.runtime.disks import require_disks
from hyper_merge.runtime.names import name_key, prompt_word, unique_name
from hyper_merge.runtime.progress import Progress


@dataclass(frozen=True)
class ExtractRequest(Request):
    """The request for an extraction.

    Attributes:
        base: The checkpoint that the LoRA is added to.
        checkpoint: The checkpoint that results.
        rank: Of the LoRA; capped in layers that are smaller.
        name: Of the LoRA; None for `<checkpoint>-from-<base>`.
        output: A WebUI-shaped models folder, or the path of the .safetensors file.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: Of the written file.
        overwrite: Whether existing files may be replaced.
        seed: Of everything random.
        damaged: Whether to `refuse` files that look damaged or unfinished, or to `accept` them.
    """

    base: Path
    checkpoint: Path
    rank: int = 64
    name: str | None = None
    output: Path = Path("models")
    device: str = "auto"
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    overwrite: bool = False
    seed: int = 0
    damaged: Literal["refuse", "accept"] = "refuse"

    PARSERS: ClassVar[Parsers] = {
        **FIELD_PARSERS,
        "base": parse_path,
        "checkpoint": parse_path,
        "rank": whole(1, LARGEST_RANK),
        "name": optional(parse_name),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_file:
            with settings_placed(key_place):
                self._require_name_of_file()

    @property
    def is_file(self) -> bool:
        """Tells whether `output` is the LoRA's own path, and not that of a models folder."""
        return self.output.suffix == ".safetensors"

    def _require_name_of_file(self) -> None:
        try:
            parse_name(self.output.stem)
        except RecipeError as error:
            error.message = f"{self.output.name} is the LoRA's name in prompts: {error.message}"
            error.key = "output"
            raise
        if self.name not in (None, self.output.stem):
            raise RecipeError(
                f"{self.output} has a name already", hint="give one of the two", key="name"
            )


@dataclass(frozen=True)
class ExtractResult:
    """The LoRA, and how good it is; shares are of squared norms ("energy")."""

    path: Path
    base: str  # file names without suffix
    checkpoint: str
    rank: int
    explained: float  # of all differences in the layers, by the file as written
    parts: Mapping[str, float]  # the explained share of each part that differs
    layers: int  # with a difference
    not_carried: Mapping[str, float]  # kind -> share of all differences, layers included
    size: int  # bytes of the file


def run_extract(
    request: ExtractRequest, folders: Folders | None, progress: Progress
) -> ExtractResult:
    """Writes the LoRA; on any failure every existing file stays as it was.

    Args:
        request: files and options.
        folders: where the LoRA goes, for a host whose folders are not all in `output`; else None.
        progress: progress and interrupt.

    Raises:
        HyperMergeError: refused input, nothing to extract, a full disk, or the user's interrupt.
    """
    path, cache = _place(request, folders)
    inputs = _inputs(request, progress)
    options = PassOptions(resolve_device(request.device), request.seed)
    _require_room(request, inputs, path)
    costs = extraction_costs(inputs, request.rank, cache, options.device)
    hashing, reading, writing = progress.split(costs)
    with device_job(options.device), FileTransaction(overwrite=request.overwrite) as outputs:
        sources = hash_sources(inputs.read, cache, hashing)
        difference = find_difference(inputs, request.rank, options, reading)
        _require_difference(difference, inputs)
        file = _file(request, path, inputs, sources, difference.explained())
        hashed_and_written = 2 * difference.nbytes
        counter = writing.counter("writing the LoRA", {path: hashed_and_written})
        tick = partial(counter.advance, path)
        write_lora(outputs, path, inputs.layout.layers, difference.factors, file, tick)
        size = outputs.size_of(path)
        progress.report("putting the file in place", 1.0)
    return ExtractResult(
        path=path,
        base=inputs.read[0].stem,
        checkpoint=inputs.read[1].stem,
        rank=request.rank,
        explained=difference.explained(),
        parts={part: difference.explained(part) for part in PARTS if difference.energy(part) > 0},
        layers=len(difference.layers),
        not_carried=difference.not_carried(),
        size=size,
    )


def _place(request: ExtractRequest, folders: Folders | None) -> tuple[Path, Path | None]:
    """Returns the path of the LoRA, which may be written, and the folder that remembers hashes."""
    if folders is None and request.is_file:
        path, cache = request.output, None
    else:
        folders = folders or Folders.under(request.output)
        owners = folders.lora_owners()
        name = request.name or _free_name(request, folders, owners)
        path, cache = folders.loras / f"{name}.safetensors", folders.cache
        owner = owners.get(name_key(name))
        if owner is not None:
            raise NameTakenError(f"{name} is a LoRA of the run {owner}", hint="choose another name")
    require_no_source(path, (request.base, request.checkpoint))
    for suffix in (".safetensors", *CARD_SUFFIXES):
        require_free(path.with_suffix(suffix), overwrite=request.overwrite)
    return path, cache


def _free_name(request: ExtractRequest, folders: Folders, owners: Container[str]) -> str:
    """Returns a name for these two checkpoints: the same every time, and never that of two others."""

    def is_taken(name: str) -> bool:
        metadata = metadata_of(folders.loras / f"{name}.safetensors")
        is_of_others = metadata.get(KIND) == STANDALONE_KIND and not _is_same(metadata, request)
        return name_key(name) in owners or is_of_others

    return unique_name(prompt_word(f"{request.checkpoint.stem}-from-{request.base.stem}"), is_taken)


def _is_same(metadata: Mapping[str, str], request: ExtractRequest) -> bool:
    """Tells whether a LoRA says that it was extracted from two files of these names."""
    try:
        recipe = parse_json(metadata.get(RECIPE, ""))
        return bool(
            (recipe["base"], recipe["checkpoint"]) == (request.base.name, request.checkpoint.name)
        )
    except (ValueError, LookupError, TypeError):
        return False


def _inputs(request: ExtractRequest, progress: Progress) -> MergeInputs:
    paths = (request.base, request.checkpoint)
    base, header = headers = [read_header(path) for path in paths]
    accepts_damaged = request.damaged == "accept"
    layout = common_layout(headers, accepts_damaged=accepts_damaged)
    layout = layout.without_ends()  # they go into no LoRA that all programs take
    if not layout.layers:
        raise ExtractionError(f"{header.name} has no layers that a LoRA can hold")
    for warning in (*check_distinct(headers), *find_unfinished(headers), *find_quantised(headers)):
        progress.warn(warning)
    dtype = getattr(torch, request.dtype)
    return MergeInputs((header,), base, layout, (1.0,), dtype, accepts_damaged=accepts_damaged)


def _require_room(request: ExtractRequest, inputs: MergeInputs, path: Path) -> None:
    layers = inputs.layout.layers
    ranks = even_ranks((request.rank,), [(layer.m, layer.n) for layer in layers])
    alphas = (inputs.layout.family.alpha_for(request.rank),)
    require_disks({path.parent: lora_bytes(layers, ranks, inputs.dtype, alphas)})


def _file(
    request: ExtractRequest,
    path: Path,
    inputs: MergeInputs,
    sources: tuple[SourceRecord, ...],
    explained: float,
) -> LoraFile:
    base, checkpoint = (header.stem for header in inputs.read)
    return LoraFile(
        lineage=Lineage(base, inputs.layout.family, _recipe(request), sources, current_time()),
        run=path.stem,
        index=0,
        count=1,
        rank=request.rank,
        multipliers={checkpoint: 1.0},
        explained=explained,
        dtype=inputs.dtype,
        alone=checkpoint,
    )


def _recipe(request: ExtractRequest) -> dict[str, str]:
    return {
        "type": "extraction",
        "base": request.base.name,
        "checkpoint": request.checkpoint.name,
        "rank": str(request.rank),
        "dtype": request.dtype,
        "seed": str(request.seed),
    }


def _require_difference(difference: LowRankDifference, inputs: MergeInputs) -> None:
    if difference.layers:
        return
    base, checkpoint = (header.name for header in inputs.read)
    elsewhere = [kind for kind, energy in difference.outside.items() if energy > 0]
    where = f", only in their {', '.join(elsewhere)}" if elsewhere else ""
    raise ExtractionError(
        f"{base} and {checkpoint} do not differ in any layer that a LoRA can hold{where}",
        hint="there is nothing to extract",
    )
