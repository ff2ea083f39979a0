"""Two checkpoints in, one LoRA out that turns the first into the second: the simplest case."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch

from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.analysis.streaming_pass import PassOptions
from hyper_merge.checkpoints.compatibility import check_distinct
from hyper_merge.checkpoints.io.atomic_file import require_free
from hyper_merge.checkpoints.io.transaction import FileTransaction
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
from hyper_merge.loras.prompt_tags import format_tag
from hyper_merge.operations.extract.difference import LowRankDifference, find_difference
from hyper_merge.operations.merge.cost_model import extraction_costs
from hyper_merge.operations.merge.preflight import common_layout
from hyper_merge.recipe.fields import FIELD_PARSERS
from hyper_merge.recipe.parsing import LARGEST_RANK, optional, parse_name, parse_path, whole
from hyper_merge.recipe.request import (
    Parsers,
    PlaceOf,
    check_request,
    key_place,
    parse_request,
)
from hyper_merge.runs.folders import Folders, metadata_of, require_no_source
from hyper_merge.runs.hash_cache import current_time, hash_sources
from hyper_merge.runs.report import PARTS
from hyper_merge.runtime.devices import resolve_device
from hyper_merge.runtime.disks import require_disks
from hyper_merge.runtime.formatting import format_size
from hyper_merge.runtime.names import name_key, prompt_word, unique_name
from hyper_merge.runtime.progress import Progress

_PARSERS: Final[Parsers] = {
    **FIELD_PARSERS,
    "base": parse_path,
    "checkpoint": parse_path,
    "rank": whole(1, LARGEST_RANK),
    "name": optional(parse_name),
}


@dataclass(frozen=True)
class ExtractRequest:
    """What the user asks for.

    Attributes:
        base: The checkpoint that the LoRA is added to.
        checkpoint: The one that comes of it.
        rank: Of the LoRA; capped in layers that are smaller.
        name: Of the LoRA; None for `<checkpoint>-from-<base>`.
        output: A WebUI-shaped models folder, or the path of the .safetensors file.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: Of the written file.
        overwrite: Whether existing files may be replaced.
        seed: Of everything random.
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

    def __post_init__(self) -> None:
        check_request(self, _PARSERS)
        if self.is_file:
            with settings_placed(key_place):
                self._require_name_of_file()

    @classmethod
    def parse(cls, values: Mapping[str, object], where: PlaceOf) -> ExtractRequest:
        """Returns the request that plain values describe; `where` gives the place of each.

        Raises:
            RecipeError: a value is refused.
        """
        return parse_request(cls, values, _PARSERS, where)

    @property
    def is_file(self) -> bool:
        """Whether `output` is the LoRA's own path, and not that of a models folder."""
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
    parts: Mapping[
        str, float
    ]  # the same in the "unet" and the "text_encoder", as far as they differ
    layers: int  # with a difference
    not_carried: Mapping[str, float]  # kind -> share of all differences, layers included
    size: int  # bytes of the file


def run_extract(
    wanted: ExtractRequest, progress: Progress, folders: Folders | None = None
) -> ExtractResult:
    """Writes the LoRA; on any failure every existing file stays as it was.

    Args:
        wanted: what the user asks for.
        progress: progress and interrupt.
        folders: where the LoRA goes, for a host whose folders are not all in `output`.

    Raises:
        HyperMergeError: refused input, nothing to extract, a full disk, or the user's interrupt.
    """
    path, cache = _place(wanted, folders)
    inputs = _inputs(wanted, progress)
    options = PassOptions(resolve_device(wanted.device), wanted.seed)
    _require_room(wanted, inputs, path)
    costs = extraction_costs(inputs, wanted.rank, cache, options.device)
    hashing, reading, writing = progress.split(costs)
    with FileTransaction(overwrite=wanted.overwrite) as outputs:
        origins = hash_sources(inputs.read, cache, hashing)
        found = find_difference(inputs, wanted.rank, options, reading)
        _require_difference(found, inputs)
        file = _file(wanted, path, inputs, origins, found.explained())
        counter = writing.counter(
            "writing the LoRA", {path: 2 * found.nbytes}
        )  # hashed and written

        def tick(count: int) -> None:
            counter.add(path, count)
            counter.tell()

        write_lora(outputs, path, inputs.layout.layers, found.factors, file, tick)
        size = outputs.size_of(path)
        progress.report("putting the file in place", 1.0)
    return ExtractResult(
        path=path,
        base=inputs.read[0].stem,
        checkpoint=inputs.read[1].stem,
        rank=wanted.rank,
        explained=found.explained(),
        parts={part: found.explained(part) for part in PARTS if found.energy(part) > 0},
        layers=len(found.layers),
        not_carried=found.not_carried(),
        size=size,
    )


def format_extraction(extracted: ExtractResult) -> str:
    """The outcome as plain text."""
    parts = ", ".join(f"{PARTS[part]} {share:.2%}" for part, share in extracted.parts.items())
    outside = ", ".join(f"{kind} {share:.3%}" for kind, share in extracted.not_carried.items())
    return (
        f"{extracted.path.stem}: from {extracted.base} to {extracted.checkpoint},"
        f" rank {extracted.rank} in {extracted.layers} layers, {format_size(extracted.size)}\n"
        f"explained: {extracted.explained:.2%} of all differences in the layers ({parts})\n"
        f"not carried by a LoRA, as a share of all differences: {outside or 'nothing'}\n"
        f"LoRA: {extracted.path}\n\n"
        f"To get {extracted.checkpoint}, load {extracted.base} and put this into the prompt:\n"
        + format_tag(extracted.path.stem, 1.0)
    )


def _place(wanted: ExtractRequest, folders: Folders | None) -> tuple[Path, Path | None]:
    """The file, free to be written, and the folder that remembers hashes."""
    if folders is None and wanted.is_file:
        path, cache = wanted.output, None
    else:
        folders = folders or Folders.under(wanted.output)
        owners = folders.lora_owners()
        name = wanted.name or _free_name(wanted, folders, owners)
        path, cache = folders.loras / f"{name}.safetensors", folders.cache
        owner = owners.get(name_key(name))
        if owner is not None:
            raise NameTakenError(f"{name} is a LoRA of the run {owner}", hint="choose another name")
    require_no_source(path, (wanted.base, wanted.checkpoint))
    for suffix in (".safetensors", *CARD_SUFFIXES):
        require_free(path.with_suffix(suffix), overwrite=wanted.overwrite)
    return path, cache


def _free_name(wanted: ExtractRequest, folders: Folders, owners: Container[str]) -> str:
    """A name for these two checkpoints: the same each time, and that of no other two."""

    def is_taken(name: str) -> bool:
        found = metadata_of(folders.loras / f"{name}.safetensors")
        is_of_others = found.get(KIND) == STANDALONE_KIND and not _is_same(found, wanted)
        return name_key(name) in owners or is_of_others

    return unique_name(prompt_word(f"{wanted.checkpoint.stem}-from-{wanted.base.stem}"), is_taken)


def _is_same(metadata: Mapping[str, str], wanted: ExtractRequest) -> bool:
    """Whether a LoRA says that it was extracted from two files of these names."""
    try:
        recipe = json.loads(metadata.get(RECIPE, ""))
        return bool(
            (recipe["base"], recipe["checkpoint"]) == (wanted.base.name, wanted.checkpoint.name)
        )
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


def _inputs(wanted: ExtractRequest, progress: Progress) -> MergeInputs:
    paths = (wanted.base, wanted.checkpoint)
    base, header = headers = [read_header(path) for path in paths]
    layout = common_layout(headers)
    if not layout.layers:
        raise ExtractionError(f"{header.name} has no layers that a LoRA can hold")
    for warning in check_distinct(paths):
        progress.warn(warning)
    return MergeInputs((header,), base, layout, (1.0,), getattr(torch, wanted.dtype))


def _require_room(wanted: ExtractRequest, inputs: MergeInputs, path: Path) -> None:
    layers = inputs.layout.layers
    ranks = even_ranks((wanted.rank,), [(layer.m, layer.n) for layer in layers])
    require_disks(
        {
            path.parent: lora_bytes(
                layers, ranks, inputs.dtype, (inputs.layout.family.alpha_for(wanted.rank),)
            )
        }
    )


def _file(
    wanted: ExtractRequest,
    path: Path,
    inputs: MergeInputs,
    origins: tuple[SourceRecord, ...],
    explained: float,
) -> LoraFile:
    base, checkpoint = (header.stem for header in inputs.read)
    return LoraFile(
        lineage=Lineage(base, inputs.layout.family, _recipe(wanted), origins, current_time()),
        run=path.stem,
        index=0,
        count=1,
        rank=wanted.rank,
        multipliers={checkpoint: 1.0},
        explained=explained,
        dtype=inputs.dtype,
        alone=checkpoint,
    )


def _recipe(wanted: ExtractRequest) -> dict[str, str]:
    return {
        "type": "extraction",
        "base": wanted.base.name,
        "checkpoint": wanted.checkpoint.name,
        "rank": str(wanted.rank),
        "dtype": wanted.dtype,
        "seed": str(wanted.seed),
    }


def _require_difference(found: LowRankDifference, inputs: MergeInputs) -> None:
    if found.layers:
        return
    base, checkpoint = (header.name for header in inputs.read)
    elsewhere = [kind for kind, energy in found.outside.items() if energy > 0]
    where = f", only in their {', '.join(elsewhere)}" if elsewhere else ""
    raise ExtractionError(
        f"{base} and {checkpoint} do not differ in any layer that a LoRA can hold{where}",
        hint="there is nothing to extract",
    )
