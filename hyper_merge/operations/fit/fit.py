"""A checkpoint from outside of a merge, placed on its LoRAs: multipliers, what remains, a top-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from hyper_merge.analysis.loss_weights import relative_weights
from hyper_merge.analysis.streaming_pass import PassOptions, pass_costs
from hyper_merge.checkpoints.io.atomic_file import require_free
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.errors import NameTakenError, OutputError
from hyper_merge.loras.metadata import SourceRecord
from hyper_merge.loras.stack import LoraStack
from hyper_merge.operations.fit.measurement import Measurement, Residual, measure
from hyper_merge.operations.fit.request import FitInputs, FitRequest, validate_fit
from hyper_merge.operations.fit.top_up import remove_earlier, top_up, topup_stem
from hyper_merge.runs.fit_records import FitRecord, fit_record_paths, require_own_record, stage_fit
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.hash_cache import bytes_to_hash, current_time, hash_sources
from hyper_merge.runs.integrity import require_own
from hyper_merge.runs.manifest import Run
from hyper_merge.runs.report import PARTS, CheckpointReport, CompanionGain, part_losses
from hyper_merge.runs.weighted_loras import shared_files
from hyper_merge.runtime.progress import Progress

_HASHED: Final = 120.0  # for each byte, in the unit of `pass_costs`


def run_fit(wanted: FitRequest, folders: Folders, progress: Progress) -> FitRecord:
    """Fits a checkpoint and writes record, text and perhaps a private LoRA, all or none.

    Args:
        wanted: what the user asks for.
        folders: where the run is, its LoRAs and hyper-model.
        progress: progress and interrupt.

    Raises:
        HyperMergeError: an unknown run, one whose files are missing or were changed, a checkpoint
            of another family, a name that is taken, a full disk, or the user's interrupt.
    """
    job = prepare_fit(wanted, folders)
    checking, fitting, topping = progress.split(_costs(job, folders, topup=bool(wanted.topup)))
    origin = _checked(job, folders, checking)
    with FileTransaction(overwrite=wanted.overwrite) as outputs, _opened(job) as added:
        measured = measure(job.inputs, added, job.options, fitting)
        fitted = _fitted(job, measured, origin)
        if wanted.topup and fitted.differs:
            rest = Residual(job.inputs, added, _multipliers(job, measured), job.options)
            topups = top_up(outputs, job, (rest, measured, origin), wanted.topup, topping)
            fitted = replace(fitted, topups=topups)
        if wanted.overwrite:
            remove_earlier(outputs, job, folders, fitted.topups)
        stage_fit(outputs, job.run, fitted)
        progress.report("putting the files in place", 1.0)
    return fitted


def prepare_fit(wanted: FitRequest, folders: Folders) -> FitInputs:
    """The order held against the run, the file and the names that it takes; nothing is written.

    Raises:
        HyperMergeError: as for `examined`, and a name that is taken.
    """
    job = validate_fit(wanted, folders)
    paths = fit_record_paths(job.run, job.name)
    if paths[0].parent.is_symlink():
        raise OutputError(
            f"{paths[0].parent} is a link, and links are not followed",
            hint="put the folder itself there, or remove the link",
        )
    require_own_record(job.run, job.name)
    for path in paths:
        require_free(path, overwrite=wanted.overwrite)
    stem = topup_stem(job, folders, overwrite=wanted.overwrite)
    return replace(job, topup_stem=stem)


def fit_onto(run: Run, path: Path, folders: Folders, progress: Progress) -> FitRecord:
    """The same without writing anything: the multipliers of a checkpoint."""
    job = validate_fit(FitRequest(run.name, path), folders)
    checking, fitting, _ = progress.split(_costs(job, folders, topup=False))
    origin = _checked(job, folders, checking)
    with _opened(job) as added:
        return _fitted(job, measure(job.inputs, added, job.options, fitting), origin)


def _opened(job: FitInputs) -> LoraStack:
    base, _ = job.inputs.read
    return LoraStack(shared_files(job.run), base, job.inputs.layout)


def _costs(job: FitInputs, folders: Folders, *, topup: bool) -> tuple[float, float, float]:
    """Of checking, fitting, and a private LoRA, in one unit."""
    entries = sum(pass_costs(job.inputs, PassOptions(job.options.device)).values())
    loras = sum(path.stat().st_size for path in shared_files(job.run) if path.exists())
    hashing = bytes_to_hash(job.inputs.headers, folders.cache)
    return _HASHED * (loras + hashing), entries, 3 * entries if topup else 0.0


def _checked(job: FitInputs, folders: Folders, progress: Progress) -> SourceRecord:
    """The checkpoint's hashes, if the LoRAs are the run's own and its name is free.

    Raises:
        RunError: a LoRA is missing, edited or replaced.
        NameTakenError: another checkpoint of the merge has the fit's name.
    """
    checking, hashing = progress.split([1.0, 1.0])
    require_own(job.run, shared_files(job.run), checking)
    (origin,) = hash_sources(job.inputs.headers, folders.cache, hashing)
    for source in job.run.sources:
        if Path(source.name).stem == job.name and source.sha256 != origin.sha256:
            raise NameTakenError(
                f"{job.name} is another checkpoint of the run {job.run.name}",
                hint="give this one a name of its own",
            )
    return origin


def _multipliers(job: FitInputs, measured: Measurement) -> dict[str, Tensor]:
    """By the layers' part: of every LoRA, then of every companion, which takes the UNet's."""
    report = job.run.report
    layers = job.inputs.layout.layers
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


def _fitted(job: FitInputs, measured: Measurement, origin: SourceRecord) -> FitRecord:
    multipliers = _multipliers(job, measured)
    layers = job.inputs.layout.layers
    energies = torch.tensor([sums.energy for sums in measured.layers], dtype=torch.float64)
    errors = torch.tensor(measured.lefts(multipliers, layers), dtype=torch.float64)
    inside, outside = float(energies.sum()), sum(measured.outside.values())
    return FitRecord(
        run=job.run.name,
        run_created=job.run.created,
        created=current_time(),
        row=_row(job, multipliers, (energies, errors), outside),
        path=str(job.inputs.headers[0].path.absolute()),
        sha256=origin.sha256,
        legacy_hash=origin.legacy_hash,
        differs=inside > 0,
        not_carried={
            kind: energy / (inside + outside or 1.0) for kind, energy in measured.outside.items()
        },
        parts=part_losses(layers, energies, errors),
        recovered=tuple(
            CompanionGain(kind, _share(sums, multipliers["unet"]))
            for kind, sums in measured.vectors.items()
        ),
    )


def _row(
    job: FitInputs, multipliers: Mapping[str, Tensor], found: tuple[Tensor, Tensor], outside: float
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
