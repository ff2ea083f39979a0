"""Exports one LoRA per checkpoint of a run: its LoRAs with the multipliers folded in."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.architectures.spec import PartName
from hyper_merge.checkpoints.io.transaction import FileTransaction, require_free
from hyper_merge.errors import ExtractionError, RunError
from hyper_merge.loras.cards import CARD_SUFFIXES
from hyper_merge.loras.lora_file import lora_bytes, write_lora
from hyper_merge.loras.metadata import CHECKPOINT, KIND, RUN, STANDALONE_KIND, LoraFile
from hyper_merge.loras.prompt_tags import format_tag
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
from hyper_merge.recipe.request import Parsers, Request
from hyper_merge.runs.folders import Folders, metadata_of
from hyper_merge.runs.integrity import require_family, require_own
from hyper_merge.runs.report import CheckpointReport
from hyper_merge.runs.run import Run, load_run
from hyper_merge.runs.weighted_loras import lineage_of_run
from hyper_merge.runtime.disks import require_disks
from hyper_merge.runtime.names import distinct_words, name_key, unique_name
from hyper_merge.runtime.parallel import map_with_progress
from hyper_merge.runtime.progress import Progress


@dataclass(frozen=True)
class ExportRequest(Request):
    """The request for an export.

    Attributes:
        run: Its name.
        checkpoints: Names of the checkpoints; None for all of the run.
        rank: That each layer is cut down to; None to keep the whole sum.
        overwrite: Whether an earlier export of the same may be replaced.
    """

    run: str
    checkpoints: tuple[str, ...] | None = None
    rank: int | None = None
    overwrite: bool = False

    PARSERS: ClassVar[Parsers] = {
        "run": str,
        "checkpoints": optional(parse_words),
        "rank": optional(whole(1, LARGEST_RANK)),
        "overwrite": parse_flag,
    }


@dataclass(frozen=True)
class ExportResult:
    """The LoRA of one checkpoint, and how good it is."""

    path: Path
    checkpoint: str
    hyper_model: Path  # that it is added to
    rank: int  # the most that a layer has
    explained: (
        float  # of the checkpoint's differences, by the run's LoRAs, as the merge counts them
    )
    lost: float  # of the sum's squared norm: by rounding, and by cutting ranks if requested
    size: int  # bytes of the file
    companions: str  # tags of the run's companions, which are still needed in addition; or nothing


def run_export(
    request: ExportRequest, folders: Folders, progress: Progress
) -> tuple[ExportResult, ...]:
    """Writes the LoRAs, all or none; on any failure every existing file stays as it was.

    Args:
        request: run, files and options.
        folders: where the run is, and its LoRAs.
        progress: progress and interrupt.

    Raises:
        HyperMergeError: an unknown run or checkpoint, a LoRA of the run that is missing or not its
            own, a name that is taken, a full disk, or the user's interrupt.
    """
    run = load_run(folders, request.run)
    family = require_family(run)
    rows = _rows(run, request.checkpoints)
    paths = _paths(run, rows, folders, overwrite=request.overwrite)
    checking, *folding = progress.split([1.0, *[3.0] * len(rows)])
    shared = run.loras[: len(run.report.loras)]
    private = {row.name: _private_loras(run, row) for row in rows}
    require_own(run, (*shared, *(path for row in rows for path in private[row.name])), checking)
    if run.hyper_model in run.missing:
        progress.warn(f"{run.hyper_model} is missing or another file; these LoRAs go with no other")
    with FileTransaction(overwrite=request.overwrite) as outputs, ExitStack() as stack:
        loras = [stack.enter_context(LoraReader(path, family)) for path in shared]
        exported = tuple(
            _export(
                outputs,
                paths[row.name],
                run,
                row,
                WeightedSum(
                    [
                        *loras,
                        *(stack.enter_context(LoraReader(p, family)) for p in private[row.name]),
                    ],
                    partial(_multipliers_in, row),
                    request.rank,
                ),
                part,
            )
            for row, part in zip(rows, folding, strict=True)
        )
        progress.report("putting the files in place", 1.0)
    return exported


def multipliers_of(row: CheckpointReport, part: PartName) -> tuple[float, ...]:
    """Returns the multipliers of a checkpoint's LoRAs, its private one last, in one part's layers."""
    return (*row.multipliers_of(part), *((1.0,) if row.topup else ()))


def _multipliers_in(row: CheckpointReport, layer: Layer) -> tuple[float, ...]:
    return multipliers_of(row, layer.part)


def _private_loras(run: Run, row: CheckpointReport) -> tuple[Path, ...]:
    return tuple(path for path in run.loras if row.topup and path.stem == row.topup)


def _rows(run: Run, names: Sequence[str] | None) -> list[CheckpointReport]:
    known = {row.name: row for row in run.report.checkpoints}
    rows = []
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
        rows.append(row)
    return rows


def _paths(
    run: Run, rows: Sequence[CheckpointReport], folders: Folders, *, overwrite: bool
) -> dict[str, Path]:
    """Returns the paths by checkpoint, free to be written."""
    names = _names(run, folders)
    paths = {row.name: folders.loras / f"{names[row.name]}.safetensors" for row in rows}
    for path in paths.values():
        for suffix in (".safetensors", *CARD_SUFFIXES):
            require_free(path.with_suffix(suffix), overwrite=overwrite)
    return paths


def _names(run: Run, folders: Folders) -> dict[str, str]:
    """Returns a name for every checkpoint: the same every time, and that of nothing else."""
    rows = [row.name for row in run.report.checkpoints]
    owners = folders.lora_owners()
    names: dict[str, str] = {}
    chosen: set[str] = set()

    def is_taken(name: str, checkpoint: str) -> bool:
        known = name_key(name) in owners or name_key(name) in chosen
        return known or _is_of_another(folders.loras / f"{name}.safetensors", run, checkpoint)

    for row, word in zip(rows, distinct_words(rows), strict=True):
        names[row] = unique_name(f"{run.name}_{word}", partial(is_taken, checkpoint=row))
        chosen.add(name_key(names[row]))
    return names


def _is_of_another(path: Path, run: Run, checkpoint: str) -> bool:
    """Tells whether a file is there that is no export of this very checkpoint."""
    metadata = metadata_of(path)
    identity = (metadata.get(KIND), metadata.get(RUN), metadata.get(CHECKPOINT))
    return path.exists() and identity != (STANDALONE_KIND, run.name, checkpoint)


def _export(
    outputs: FileTransaction,
    path: Path,
    run: Run,
    row: CheckpointReport,
    total: WeightedSum,
    progress: Progress,
) -> ExportResult:
    layers, ranks = zip(*total.ranks().values(), strict=True)
    file = _file(run, row, max(ranks), total)
    alpha = require_family(run).alpha_for(file.rank)
    size = lora_bytes(layers, [(rank,) for rank in ranks], file.dtype, (alpha,))
    require_disks({path.parent: size})
    folding, writing = progress.split([1.0, 1.0])
    sums = _fold(total, layers, alpha, file.dtype, folding)
    factors = {module: stored.factors for module, stored in sums.items()}
    counter = writing.counter("writing the LoRA", {path: 2 * size})  # hashed and written
    write_lora(outputs, path, layers, factors, file, partial(counter.advance, path))
    energy = sum(stored.energy for stored in sums.values())
    companions = run.report.companion_multipliers(row)
    return ExportResult(
        path=path,
        checkpoint=row.name,
        hyper_model=run.hyper_model,
        rank=file.rank,
        explained=row.fidelity,
        lost=sum(stored.lost for stored in sums.values()) / energy if energy > 0 else 0.0,
        size=outputs.size_of(path),
        companions=" ".join(format_tag(*pair) for pair in companions),
    )


def _fold(
    total: WeightedSum,
    layers: Sequence[Layer],
    alpha: int | None,  # of the file
    dtype: torch.dtype,
    progress: Progress,
) -> dict[str, StoredSum]:
    """Returns the sum in every layer, by module."""
    costs = {layer: float(layer.m + layer.n) for layer in layers}
    fold = partial(total.stored, alpha=alpha, dtype=dtype)
    sums = map_with_progress(fold, costs, "folding the multipliers in", progress)
    return {layer.module: stored for layer, stored in zip(layers, sums, strict=True)}


def _file(run: Run, row: CheckpointReport, rank: int, total: WeightedSum) -> LoraFile:
    return LoraFile(
        lineage=lineage_of_run(run, run.hyper_model.stem),
        run=run.name,
        index=0,
        count=1,
        rank=rank,
        multipliers={row.name: 1.0},
        explained=None if total.rank else row.fidelity,
        dtype=total.dtype,
        alone=row.name,
    )
