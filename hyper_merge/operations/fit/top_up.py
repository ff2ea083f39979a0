"""Private LoRAs of what a run's shared ones leave of a fitted checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

import torch

from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.decomposition.rank_allocation import ranks_within, spread_ranks
from hyper_merge.errors import NameTakenError
from hyper_merge.loras.lora_file import lora_bytes, write_lora
from hyper_merge.loras.metadata import LoraFile, SourceRecord
from hyper_merge.operations.fit.measurement import Measurement, Residual
from hyper_merge.operations.fit.request import FitInputs
from hyper_merge.recipe.parsing import PrivateLoraTarget
from hyper_merge.runs.fit_records import PrivateLoraRecord, fit_record_paths
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.weighted_loras import lineage_of_run
from hyper_merge.runtime.disks import require_disks
from hyper_merge.runtime.names import LONGEST_WORD, name_key, prompt_word, unique_name
from hyper_merge.runtime.progress import Progress, count

_MARGIN: Final = 0.995  # of what may remain: rounding and the truncated SVD take a little


def topup_stem(job: FitInputs, folders: Folders, *, overwrite: bool) -> str:
    """The private LoRA's name without the rank: one that no other fit of the run has at any rank.

    Raises:
        NameTakenError: a file of that name is there which no fit knows of.
    """
    of_others = folders.fitted_names(job.run.name, but=job.name)
    taken = {name_key(name.rpartition("-")[0]) for name in of_others}
    word = prompt_word(job.name, LONGEST_WORD)
    stem = unique_name(f"{job.run.name}_fit-{word}", lambda name: name_key(name) in taken)
    own = folders.fit_files_of(job.run.name, job.name) if overwrite else []
    for path in sorted(folders.loras.glob("*.safetensors")):
        name, _, rank = path.stem.rpartition("-")
        if name_key(name) == name_key(stem) and rank.isdecimal() and path not in own:
            raise NameTakenError(
                f"{path} is there already",
                hint=f"allow overwriting where it is of an earlier fit of {job.name}, or choose"
                " another name for this one",
            )
    return stem


def remove_earlier(
    outputs: FileTransaction, job: FitInputs, folders: Folders, topups: Sequence[PrivateLoraRecord]
) -> None:
    """The private LoRA of an earlier fit goes with its replacement, unless it is replaced itself."""
    records = {path.stem for path in fit_record_paths(job.run, job.name)}
    written = {name_key(name) for name in (*records, *(each.name for each in topups))}
    for path in folders.fit_files_of(job.run.name, job.name):
        if name_key(path.stem) not in written:
            outputs.remove(path)


def top_up(
    outputs: FileTransaction,
    job: FitInputs,
    of: tuple[Residual, Measurement, SourceRecord],
    wish: PrivateLoraTarget,
    progress: Progress,
) -> tuple[PrivateLoraRecord, ...]:
    """Stages a private LoRA of what remains; none where the share is reached without."""
    rest, measured, origin = of
    looking, making, writing = progress.split([1.0, 1.0, 0.3])
    layers = job.inputs.layout.layers
    costs = [layer.m + layer.n for layer in layers]
    ranks = _ranks(rest, measured, wish, costs, looking)
    if not any(ranks):
        return ()
    mean = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)) / sum(costs)
    rank = max(round(mean), 1)
    path = job.run.loras[0].parent / f"{job.topup_stem}-{rank}.safetensors"
    alpha, dtype = job.inputs.layout.family.alpha_for(rank), rest.added.dtype
    size = lora_bytes(layers, [(each,) for each in ranks], dtype, (alpha,))
    require_disks({path.parent: size})
    found = [each for each in rest.low_rank(ranks, (alpha, dtype), making) if each]
    gained = sum(each.energy - each.error for each in found)
    explained = 1 - (measured.left(rest.multipliers, layers) - gained) / measured.energy
    file = _file(job, origin, (rank, dtype), explained)
    factors = {each.layer.module: (each.up, each.down) for each in found}
    counter = writing.counter("writing the top-up", {path: 2 * size})  # hashed and written
    write_lora(outputs, path, layers, factors, file, partial(count, counter, path))
    digest = outputs.metadata_of(path)["sshs_model_hash"]
    return (PrivateLoraRecord(path.stem, rank, explained, outputs.size_of(path), digest),)


def _ranks(
    rest: Residual,
    measured: Measurement,
    wish: PrivateLoraTarget,
    costs: Sequence[int],
    progress: Progress,
) -> list[int]:
    """Of the private LoRA in every layer, where they take away most; none if the share is reached."""
    left = (1 - (wish.share or 0.0)) * measured.energy
    if wish.rank is None and measured.left(rest.multipliers, rest.inputs.layout.layers) <= left:
        return []
    spectra = rest.spectra(progress)
    if wish.rank is not None:
        return spread_ranks(spectra, costs, wish.rank * sum(costs))
    return ranks_within(spectra, costs, _MARGIN * left)


def _file(
    job: FitInputs, origin: SourceRecord, stored: tuple[int, torch.dtype], explained: float
) -> LoraFile:
    rank, dtype = stored
    return LoraFile(
        lineage=lineage_of_run(job.run, job.run.hyper_model.stem, [origin]),
        run=job.run.name,
        index=0,
        count=1,
        rank=rank,
        multipliers={job.name: 1.0},
        explained=explained,
        dtype=dtype,
        tops_up=job.name,
    )
