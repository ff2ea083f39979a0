"""One LoRA per checkpoint from an existing run: its shared LoRAs with the multipliers folded in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.architectures.spec import Family, PartName
from hyper_merge.checkpoints.io.atomic_file import require_free
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.errors import ExtractionError, RunError
from hyper_merge.loras.cards import CARD_SUFFIXES
from hyper_merge.loras.lora_file import lora_bytes, write_lora
from hyper_merge.loras.metadata import CHECKPOINT, KIND, RUN, STANDALONE_KIND, LoraFile
from hyper_merge.loras.prompt_tags import format_tag, format_tags
from hyper_merge.loras.reader import LoraReader
from hyper_merge.loras.weighted_sum import StoredSum, WeightedSum
from hyper_merge.recipe.parsing import (
    LARGEST_RANK,
    optional,
    parse_flag,
    parse_words,
    whole,
)
from hyper_merge.recipe.plain_values import unknown_word
from hyper_merge.recipe.request import Parsers, PlaceOf, check_request, parse_request
from hyper_merge.runs.folders import Folders, metadata_of
from hyper_merge.runs.integrity import require_family, require_own
from hyper_merge.runs.manifest import Run, load_run
from hyper_merge.runs.report import CheckpointReport
from hyper_merge.runs.weighted_loras import lineage_of_run
from hyper_merge.runtime.disks import require_disks
from hyper_merge.runtime.formatting import format_size
from hyper_merge.runtime.names import distinct_words, name_key, unique_name
from hyper_merge.runtime.parallel import parallel_map
from hyper_merge.runtime.progress import Progress, count


@dataclass(frozen=True)
class ExportRequest:
    """What the user asks for.

    Attributes:
        run: Its name.
        checkpoints: Names of those wanted; None for all of the run.
        rank: That each layer is cut down to; None to keep the whole sum.
        overwrite: Whether an earlier export of the same may be replaced.
    """

    run: str
    checkpoints: tuple[str, ...] | None = None
    rank: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_request(self, _PARSERS)

    @classmethod
    def parse(cls, values: Mapping[str, object], where: PlaceOf) -> ExportRequest:
        """Returns the request that plain values describe; `where` gives the place of each.

        Raises:
            RecipeError: a value is refused.
        """
        return parse_request(cls, values, _PARSERS, where)


_PARSERS: Final[Parsers] = {
    "run": str,
    "checkpoints": optional(parse_words),
    "rank": optional(whole(1, LARGEST_RANK)),
    "overwrite": parse_flag,
}


@dataclass(frozen=True)
class ExportResult:
    """One checkpoint's LoRA."""

    path: Path
    checkpoint: str
    hyper_model: Path  # that it is added to
    rank: int  # the most that a layer has
    explained: float  # of the checkpoint's differences, by the run's LoRAs
    lost: float  # of the sum's squared norm: by rounding, and by cutting ranks where that was asked
    size: int  # bytes of the file
    companions: str  # tags of the run's companions, which are still to be used besides; or nothing


def run_export(
    wanted: ExportRequest, folders: Folders, progress: Progress
) -> tuple[ExportResult, ...]:
    """Writes the LoRAs, all or none; on any failure every existing file stays as it was.

    Args:
        wanted: what the user asks for.
        folders: where the run is, and its LoRAs.
        progress: progress and interrupt.

    Raises:
        HyperMergeError: an unknown run or checkpoint, a LoRA of the run that is missing or not its
            own, a name that is taken, a full disk, or the user's interrupt.
    """
    run = load_run(folders, wanted.run)
    family = require_family(run)
    rows = _rows(run, wanted.checkpoints)
    paths = _paths(run, rows, folders, overwrite=wanted.overwrite)
    checking, *each = progress.split([1.0, *[3.0] * len(rows)])
    shared = run.loras[: len(run.report.loras)]
    own = {row.name: _topup(run, row) for row in rows}
    require_own(run, (*shared, *(path for paths in own.values() for path in paths)), checking)
    if run.hyper_model in run.missing:
        progress.warn(f"{run.hyper_model} is missing or another file; these LoRAs go with no other")
    with FileTransaction(overwrite=wanted.overwrite) as outputs, ExitStack() as stack:
        loras = [stack.enter_context(LoraReader(path, family)) for path in shared]
        exported = tuple(
            _export(
                outputs,
                paths[row.name],
                (run, row, family),
                WeightedSum(
                    [*loras, *(stack.enter_context(LoraReader(p, family)) for p in own[row.name])],
                    partial(multipliers_of, row),
                    wanted.rank,
                ),
                part,
            )
            for row, part in zip(rows, each, strict=True)
        )
        progress.report("putting the files in place", 1.0)
    return exported


def format_export(exported: Sequence[ExportResult], rank: int | None) -> str:
    """The outcome as plain text."""
    width = max(len(each.path.stem) for each in exported)
    lost = "lost by cutting" if rank else "lost by rounding"
    lines = [f"{'LoRA':{width}}  rank       size  explained before  {lost}"]
    lines += [
        f"{each.path.stem:{width}}  {each.rank:4} {format_size(each.size):>10}  {each.explained:16.2%}"
        f"  {each.lost:{len(lost)}.4%}"
        for each in exported
    ]
    first = exported[0]
    besides = f" {first.companions}" if first.companions else ""
    lines += [
        f"in {first.path.parent}",
        "",
        f"To get {first.checkpoint}, load {first.hyper_model.stem} and put this into the prompt:",
        format_tag(first.path.stem, 1.0) + besides,
    ]
    return "\n".join(lines)


def multipliers_of(row: CheckpointReport, part: PartName) -> tuple[float, ...]:
    """What a checkpoint's LoRAs, its private one last, count in the layers of one part."""
    return (*row.multipliers_of(part), *((1.0,) if row.topup else ()))


def _topup(run: Run, row: CheckpointReport) -> tuple[Path, ...]:
    return tuple(path for path in run.loras if row.topup and path.stem == row.topup)


def _rows(run: Run, names: Sequence[str] | None) -> list[CheckpointReport]:
    known = {row.name: row for row in run.report.checkpoints}
    found = []
    for name in dict.fromkeys(known if names is None else names):
        row = known.get(name) or known.get(name.removesuffix(".safetensors"))
        if row is None:
            message = f"the run {run.name} has no checkpoint {name}"
            raise unknown_word(RunError, message, name, known, "It has")
        if not any(any(multipliers_of(row, part.name)) for part in require_family(run).parts):
            raise ExtractionError(
                f"all multipliers of {row.name} are 0: {run.hyper_model.name} is that"
                " checkpoint already, as far as LoRAs go",
                hint="there is nothing to export",
            )
        found.append(row)
    return found


def _paths(
    run: Run, rows: Sequence[CheckpointReport], folders: Folders, *, overwrite: bool
) -> dict[str, Path]:
    """The files by checkpoint, free to be written."""
    names = _names(run, folders)
    paths = {row.name: folders.loras / f"{names[row.name]}.safetensors" for row in rows}
    for path in paths.values():
        for suffix in (".safetensors", *CARD_SUFFIXES):
            require_free(path.with_suffix(suffix), overwrite=overwrite)
    return paths


def _names(run: Run, folders: Folders) -> dict[str, str]:
    """A name for every checkpoint: the same each time, and that of nothing else."""
    rows = [row.name for row in run.report.checkpoints]
    owners = folders.lora_owners()
    names: dict[str, str] = {}
    given: set[str] = set()

    def is_taken(name: str, checkpoint: str) -> bool:
        known = name_key(name) in owners or name_key(name) in given
        return known or _is_of_another(folders.loras / f"{name}.safetensors", run, checkpoint)

    for row, word in zip(rows, distinct_words(rows), strict=True):
        names[row] = unique_name(f"{run.name}_{word}", partial(is_taken, checkpoint=row))
        given.add(name_key(names[row]))
    return names


def _is_of_another(path: Path, run: Run, checkpoint: str) -> bool:
    """Whether a file is there that is no export of this very checkpoint."""
    found = metadata_of(path)
    own = (found.get(KIND), found.get(RUN), found.get(CHECKPOINT))
    return path.exists() and own != (STANDALONE_KIND, run.name, checkpoint)


def _export(
    outputs: FileTransaction,
    path: Path,
    of: tuple[Run, CheckpointReport, Family],
    total: WeightedSum,
    progress: Progress,
) -> ExportResult:
    run, row, family = of
    layers, ranks = zip(*total.ranks().values(), strict=True)
    file = _file(of, max(ranks), total)
    alpha = family.alpha_for(file.rank)
    size = lora_bytes(layers, [(rank,) for rank in ranks], file.dtype, (alpha,))
    require_disks({path.parent: size})
    folding, writing = progress.split([1.0, 1.0])
    sums = _fold(total, layers, (alpha, file.dtype), folding)
    factors = {name: found.factors for name, found in sums.items()}
    counter = writing.counter("writing the LoRA", {path: 2 * size})  # hashed and written
    write_lora(outputs, path, layers, factors, file, partial(count, counter, path))
    energy = sum(found.energy for found in sums.values())
    companions = run.report.companions
    return ExportResult(
        path=path,
        checkpoint=row.name,
        hyper_model=run.hyper_model,
        rank=file.rank,
        explained=row.explained,
        lost=sum(found.lost for found in sums.values()) / energy if energy > 0 else 0.0,
        size=outputs.size_of(path),
        companions=format_tags(companions, row.multipliers) if companions else "",
    )


def _fold(
    total: WeightedSum,
    layers: Sequence[Layer],
    stored: tuple[int | None, torch.dtype],  # alpha, type
    progress: Progress,
) -> dict[str, StoredSum]:
    """The sum in every layer, by module."""
    costs = {layer.module: float(layer.m + layer.n) for layer in layers}
    counter = progress.counter("folding the multipliers in", costs)
    sums: dict[str, StoredSum] = {}
    with parallel_map(torch.device("cpu"), counter.tell) as each, counter:
        take = partial(_stored, total, stored)
        for layer, found in zip(layers, each(take, layers), strict=True):
            sums[layer.module] = found
            counter.finish(layer.module)
    return sums


def _stored(total: WeightedSum, stored: tuple[int | None, torch.dtype], layer: Layer) -> StoredSum:
    return total.stored(layer, *stored)


def _file(of: tuple[Run, CheckpointReport, Family], rank: int, total: WeightedSum) -> LoraFile:
    run, row, _ = of
    return LoraFile(
        lineage=lineage_of_run(run, run.hyper_model.stem),
        run=run.name,
        index=0,
        count=1,
        rank=rank,
        multipliers={row.name: 1.0},
        explained=None if total.rank else row.explained,
        dtype=total.dtype,
        alone=row.name,
    )
