"""A checkpoint from outside of a merge, placed on its LoRAs: multipliers, what remains, a top-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from hyper_merge.analysis.loss_weights import relative_weights
from hyper_merge.analysis.streaming_pass import Work, pass_costs
from hyper_merge.checkpoints.io.atomic_file import require_free
from hyper_merge.checkpoints.io.transaction import Outputs
from hyper_merge.errors import NameTakenError, OutputError
from hyper_merge.loras.metadata import Source
from hyper_merge.loras.stack import Added
from hyper_merge.operations.fit.measurement import Measured, Rest, measure
from hyper_merge.operations.fit.request import FitOrder, Job, examined
from hyper_merge.operations.fit.top_up import remove_earlier, require_free_topup, top_up
from hyper_merge.runs.fit_records import Fitted, paths_for, stage_fit
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.hash_cache import bytes_to_hash, hashed, now
from hyper_merge.runs.integrity import require_own
from hyper_merge.runs.manifest import Run
from hyper_merge.runs.report import PARTS, CheckpointReport, Recovered, part_losses
from hyper_merge.runs.weighted_loras import shared_files
from hyper_merge.runtime.progress import Control

_HASHED: Final = 120.0  # for each byte, in the unit of `pass_costs`


def run_fit(wanted: FitOrder, folders: Folders, control: Control) -> Fitted:
    """Fits a checkpoint and writes record, text and perhaps a private LoRA, all or none.

    Args:
        wanted: what the user asks for.
        folders: where the run is, its LoRAs and hyper-model.
        control: progress and interrupt.

    Raises:
        HyperMergeError: an unknown run, one whose files are missing or were changed, a checkpoint
            of another family, a name that is taken, a full disk, or the user's interrupt.
    """
    job = prepared(wanted, folders)
    checking, fitting, topping = control.split(_costs(job, folders, topup=bool(wanted.topup)))
    origin = _checked(job, folders, checking)
    with Outputs(overwrite=wanted.overwrite) as outputs, _opened(job) as added:
        measured = measure(job.sources, added, job.work, fitting)
        fitted = _fitted(job, measured, origin)
        if wanted.topup and fitted.differs:
            rest = Rest(job.sources, added, _multipliers(job, measured), job.work)
            topups = top_up(outputs, job, (rest, measured, origin), wanted.topup, topping)
            fitted = replace(fitted, topups=topups)
        if wanted.overwrite:
            remove_earlier(outputs, job, folders, fitted.topups)
        stage_fit(outputs, job.run, fitted)
        control.step("putting the files in place", 1.0)
    return fitted


def prepared(wanted: FitOrder, folders: Folders) -> Job:
    """The order held against the run, the file and the names that it takes; nothing is written.

    Raises:
        HyperMergeError: as for `examined`, and a name that is taken.
    """
    job = examined(wanted, folders)
    paths = paths_for(job.run, job.name)
    if paths[0].parent.is_symlink():
        raise OutputError(
            f"{paths[0].parent} is a link, and links are not followed; put the folder itself there,"
            " or remove the link"
        )
    for path in paths:
        require_free(path, overwrite=wanted.overwrite)
    require_free_topup(job, folders, overwrite=wanted.overwrite)
    return job


def fit_onto(run: Run, path: Path, folders: Folders, control: Control) -> Fitted:
    """The same without writing anything: the multipliers of a checkpoint."""
    job = examined(FitOrder(run.name, path), folders)
    checking, fitting, _ = control.split(_costs(job, folders, topup=False))
    origin = _checked(job, folders, checking)
    with _opened(job) as added:
        return _fitted(job, measure(job.sources, added, job.work, fitting), origin)


def _opened(job: Job) -> Added:
    base, _ = job.sources.read
    return Added(shared_files(job.run), base, job.sources.layout)


def _costs(job: Job, folders: Folders, *, topup: bool) -> tuple[float, float, float]:
    """Of checking, fitting, and a private LoRA, in one unit."""
    entries = sum(pass_costs(job.sources, Work(job.work.device)).values())
    loras = sum(path.stat().st_size for path in shared_files(job.run) if path.exists())
    hashing = bytes_to_hash(job.sources.headers, folders.cache)
    return _HASHED * (loras + hashing), entries, 3 * entries if topup else 0.0


def _checked(job: Job, folders: Folders, control: Control) -> Source:
    """The checkpoint's hashes, if the LoRAs are the run's own and its name is free.

    Raises:
        RunError: a LoRA is missing, edited or replaced.
        NameTakenError: another checkpoint of the merge has the fit's name.
    """
    checking, hashing = control.split([1.0, 1.0])
    require_own(job.run, shared_files(job.run), checking)
    (origin,) = hashed(job.sources.headers, folders.cache, hashing)
    for source in job.run.sources:
        if Path(source.name).stem == job.name and source.sha256 != origin.sha256:
            raise NameTakenError(
                f"{job.name} is another checkpoint of the run {job.run.name}; give this one a name"
                " of its own"
            )
    return origin


def _multipliers(job: Job, measured: Measured) -> dict[str, Tensor]:
    """By the layers' part: of every LoRA, then of every companion, which takes the UNet's."""
    report = job.run.report
    layers = job.sources.layout.layers
    weights = torch.ones(len(layers), dtype=torch.float64)
    if job.run.recipe.layer_weights == "relative":  # as in the merge
        sizes = torch.tensor([sums.size for sums in measured.layers], dtype=torch.float64)
        weights = relative_weights(sizes, layers)
    found = {
        part: measured.multipliers(members, len(report.loras), weights.tolist())
        for part, members in job.groups.items()
    }
    unet = found["unet"]
    beside = unet[: len(report.companions)]
    return {part: torch.cat([found.get(part, unet), beside]) for part in PARTS}


def _fitted(job: Job, measured: Measured, origin: Source) -> Fitted:
    multipliers = _multipliers(job, measured)
    layers = job.sources.layout.layers
    energies = torch.tensor([sums.energy for sums in measured.layers], dtype=torch.float64)
    errors = torch.tensor(measured.lefts(multipliers, layers), dtype=torch.float64)
    inside, outside = float(energies.sum()), sum(measured.outside.values())
    return Fitted(
        run=job.run.name,
        run_created=job.run.created,
        created=now(),
        row=_row(job, multipliers, (energies, errors), outside),
        path=str(job.sources.headers[0].path.absolute()),
        sha256=origin.sha256,
        legacy_hash=origin.legacy_hash,
        differs=inside > 0,
        not_carried={
            kind: energy / (inside + outside or 1.0) for kind, energy in measured.outside.items()
        },
        parts=part_losses(layers, energies, errors),
        recovered=tuple(
            Recovered(kind, _share(sums, multipliers["unet"]))
            for kind, sums in measured.vectors.items()
        ),
    )


def _row(
    job: Job, multipliers: Mapping[str, Tensor], found: tuple[Tensor, Tensor], outside: float
) -> CheckpointReport:
    energies, errors = found
    members = {"unet": [], "text_encoder": [], **job.layers_of}
    everything = list(range(len(energies)))
    whole_share, unet, encoder = (
        _explained(energies[inside], errors[inside])
        for inside in (everything, members["unet"], members["text_encoder"])
    )
    loras = len(job.run.report.loras)
    text = multipliers["text_encoder"] if "text_encoder" in job.groups else None
    return CheckpointReport(
        name=job.name,
        explained=whole_share,
        explained_unet=unet,
        explained_text_encoder=encoder,
        error=max(1 - whole_share, 0.0) ** 0.5,
        not_carried=outside / (float(energies.sum()) + outside or 1.0),
        multipliers=tuple(multipliers["unet"][:loras].tolist()),
        text_multipliers=() if text is None else tuple(text[:loras].tolist()),
    )


def _explained(energies: Tensor, errors: Tensor) -> float:
    energy = float(energies.sum())
    return 1 - float(errors.sum()) / energy if energy > 0 else 1.0


def _share(sums: Sequence[Any], multipliers: Tensor) -> float:
    energy = sum(each.energy for each in sums)
    return 1 - sum(each.left(multipliers) for each in sums) / energy if energy > 0 else 1.0
