"""Makes private LoRAs for what a run's shared ones leave of a fitted checkpoint or LoRA."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch

from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.loras.lora_file import lora_bytes, write_lora
from hyper_merge.loras.metadata import LoraFile, SourceRecord
from hyper_merge.operations.fit.request import PreparedFit
from hyper_merge.recipe.parsing import PrivateLoraTarget
from hyper_merge.runs.fit_records import PrivateLoraRecord
from hyper_merge.runs.weighted_loras import base_name, lineage_of_run
from hyper_merge.runtime.disks import require_disks
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.private_loras import (
    CheckpointResidual,
    make_private_lora,
    plan_private_lora,
)


class FitResidual(CheckpointResidual, Protocol):
    """What a run's shared LoRAs leave of a file that is fitted onto them."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the shared LoRAs' factors, which the private LoRA has too."""

    @property
    def plain_energy(self) -> float:
        """Squared norm of what is fitted."""

    @property
    def plain_error(self) -> float:
        """Squared norm of the rest that the shared LoRAs leave of it."""


def top_up(
    outputs: FileTransaction,
    fit: PreparedFit,
    residual: FitResidual,
    source: SourceRecord,
    target: PrivateLoraTarget,
    progress: Progress,
) -> tuple[PrivateLoraRecord, ...]:
    """Stages a private LoRA for what remains; none where the share is reached without one.

    Args:
        outputs: the fit's files.
        fit: the fit.
        residual: what the shared LoRAs leave of the file.
        source: the file.
        target: a rank in the mean of the layers, or a share of what is fitted.
        progress: progress and interrupt.

    Raises:
        OutputError: the disk has too little room.
    """
    planning, making, writing = progress.split([1.0, 1.0, 0.3])
    layers, dtype = residual.layers, residual.dtype
    has_alpha = fit.inputs.layout.family.lora_alpha
    plan = plan_private_lora(residual, target, dtype, planning, has_alpha=has_alpha)
    if plan is None:
        return ()
    path = fit.run.loras[0].parent / f"{fit.topup_stem}-{plan.rank}.safetensors"
    size = lora_bytes(layers, [(rank,) for rank in plan.ranks], dtype, (plan.stored.alpha,))
    require_disks({path.parent: size})
    lora = make_private_lora(residual, plan, making)
    explained = 1 - (residual.plain_error - lora.gain) / residual.plain_energy
    fidelity = 1 - (residual.error - lora.weighted_gain) / residual.energy
    file = LoraFile(
        lineage=lineage_of_run(fit.run, base_name(fit.run), [source]),
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
