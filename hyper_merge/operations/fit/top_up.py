"""Makes private LoRAs for what a run's shared ones leave of a fitted checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.errors import NameTakenError
from hyper_merge.loras.lora_file import lora_bytes, write_lora
from hyper_merge.loras.metadata import LoraFile, SourceRecord
from hyper_merge.operations.fit.request import PreparedFit
from hyper_merge.operations.fit.streamed_residual import StreamedResidual
from hyper_merge.recipe.parsing import PrivateLoraTarget
from hyper_merge.runs.fit_records import PrivateLoraRecord, fit_record_paths
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.weighted_loras import lineage_of_run
from hyper_merge.runtime.disks import require_disks
from hyper_merge.runtime.names import LONGEST_WORD, name_key, prompt_word, unique_name
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.private_loras import make_private_lora, plan_private_lora


def topup_stem(fit: PreparedFit, folders: Folders, *, overwrite: bool) -> str:
    """Returns the private LoRA's name without the rank, which no other fit of the run has.

    Raises:
        NameTakenError: a file of that name exists that belongs to no fit.
    """
    of_others = folders.fitted_names(fit.run.name, but=fit.name)
    taken = {name_key(name.rpartition("-")[0]) for name in of_others}
    word = prompt_word(fit.name, LONGEST_WORD)
    stem = unique_name(f"{fit.run.name}_fit-{word}", lambda name: name_key(name) in taken)
    replaced = folders.fit_files_of(fit.run.name, fit.name) if overwrite else []
    for path in sorted(folders.loras.glob("*.safetensors")):
        name, _, rank = path.stem.rpartition("-")
        if name_key(name) == name_key(stem) and rank.isdecimal() and path not in replaced:
            raise NameTakenError(
                f"{path} exists already",
                hint=f"allow overwriting if it belongs to an earlier fit of {fit.name}, or choose"
                " another name for this one",
            )
    return stem


def remove_earlier(
    outputs: FileTransaction,
    fit: PreparedFit,
    folders: Folders,
    topups: Sequence[PrivateLoraRecord],
) -> None:
    """Removes the files of an earlier fit of this checkpoint that are not replaced."""
    records = {path.stem for path in fit_record_paths(fit.run, fit.name)}
    written = {name_key(name) for name in (*records, *(lora.name for lora in topups))}
    for path in folders.fit_files_of(fit.run.name, fit.name):
        if name_key(path.stem) not in written:
            outputs.remove(path)


def top_up(
    outputs: FileTransaction,
    fit: PreparedFit,
    residual: StreamedResidual,
    source: SourceRecord,
    target: PrivateLoraTarget,
    progress: Progress,
) -> tuple[PrivateLoraRecord, ...]:
    """Stages a private LoRA for what remains; none where the share is reached without one.

    Args:
        outputs: the fit's files.
        fit: the fit.
        residual: what the shared LoRAs leave of the checkpoint.
        source: the checkpoint's file.
        target: a rank in the mean of the layers, or a share of the checkpoint.
        progress: progress and interrupt.

    Raises:
        OutputError: the disk has too little room.
    """
    planning, making, writing = progress.split([1.0, 1.0, 0.3])
    layers, dtype = residual.layers, residual.added.dtype
    has_alpha = fit.inputs.layout.family.lora_alpha
    plan = plan_private_lora(residual, target, dtype, planning, has_alpha=has_alpha)
    if plan is None:
        return ()
    path = fit.run.loras[0].parent / f"{fit.topup_stem}-{plan.rank}.safetensors"
    size = lora_bytes(layers, [(rank,) for rank in plan.ranks], dtype, (plan.stored.alpha,))
    require_disks({path.parent: size})
    lora = make_private_lora(residual, plan, making)
    energy = float(residual.measured.plain.energies.sum())
    explained = 1 - (residual.plain_error - lora.gain) / energy
    fidelity = 1 - (residual.error - lora.weighted_gain) / residual.energy
    file = LoraFile(
        lineage=lineage_of_run(fit.run, fit.run.hyper_model.stem, [source]),
        run=fit.run.name,
        index=0,
        count=1,
        rank=lora.rank,
        multipliers={fit.name: 1.0},
        explained=explained,
        dtype=dtype,
        tops_up=fit.name,
    )
    factors = {layer.layer.module: (layer.up, layer.down) for layer in lora.layers}
    counter = writing.counter("writing the top-up", {path: 2 * size})  # hashed and written
    write_lora(outputs, path, layers, factors, file, partial(counter.advance, path))
    digest = outputs.metadata_of(path)["sshs_model_hash"]
    size = outputs.size_of(path)
    return (PrivateLoraRecord(path.stem, lora.rank, explained, size, digest, fidelity),)
