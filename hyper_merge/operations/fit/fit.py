"""Fits a checkpoint that was not part of a merge onto its LoRAs: multipliers, error, private LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hyper_merge.analysis.streaming_pass import PassOptions, pass_costs
from hyper_merge.calibration.measure import measuring_cost
from hyper_merge.checkpoints.compatibility import find_quantised
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.decomposition.linalg import share
from hyper_merge.errors import NameTakenError
from hyper_merge.loras.metadata import SourceRecord
from hyper_merge.loras.stack import LoraStack
from hyper_merge.operations.fit.measurement import Measurement, Sums, measure
from hyper_merge.operations.fit.names import remove_earlier, with_free_names
from hyper_merge.operations.fit.request import FitRequest, PreparedFit, validate_fit
from hyper_merge.operations.fit.streamed_residual import StreamedResidual
from hyper_merge.operations.fit.text import format_fit
from hyper_merge.operations.fit.top_up import top_up
from hyper_merge.operations.merge.cost_model import HASHING_COST
from hyper_merge.operations.merge.preflight import find_unfinished
from hyper_merge.runs.fit_records import FitRecord, stage_fit
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.hash_cache import bytes_to_hash, current_time, hash_sources
from hyper_merge.runs.integrity import require_own
from hyper_merge.runs.name_locks import Hold, held
from hyper_merge.runs.report import PARTS, CheckpointReport, CompanionGain, part_losses
from hyper_merge.runs.run import Run
from hyper_merge.runs.weighted_loras import shared_files
from hyper_merge.runtime.devices import device_job
from hyper_merge.runtime.progress import Progress


def run_fit(request: FitRequest, folders: Folders, progress: Progress) -> FitRecord:
    """Fits a checkpoint and writes record, text and perhaps a private LoRA, all or none.

    Args:
        request: run, files and options.
        folders: where the run is, its LoRAs and hyper-model.
        progress: progress and interrupt.

    Raises:
        HyperMergeError: an unknown run, one whose files are missing or were changed, a checkpoint
            of another family, a name that is taken, a full disk, or the user's interrupt.
    """
    fit = prepare_fit(request, folders)
    with device_job(fit.options.device), held(folders.runs, *_holds(fit)):
        fit = with_free_names(fit, request, folders)  # another fit may have taken them since
        headers = fit.inputs.headers
        for warning in (*find_unfinished(headers), *find_quantised(headers)):
            progress.warn(warning)
        return _write_fit(request, fit, folders, progress)


def _holds(fit: PreparedFit) -> tuple[Hold, ...]:
    """Returns the names that no other job may delete, replace or write while the fit runs."""
    run = fit.run
    return (
        Hold("run", run.name, shared=True),
        Hold("model", run.hyper_model.name, shared=True),
        Hold("fit", f"{run.name} {fit.name}"),
    )


def _write_fit(
    request: FitRequest, fit: PreparedFit, folders: Folders, progress: Progress
) -> FitRecord:
    """Fits the checkpoint and writes everything, with all names held."""
    costs = _costs(fit, folders, private=bool(request.topup))
    checking, running, fitting, remaining = progress.split(costs)
    source = check_sources(fit, folders, checking)
    with FileTransaction(overwrite=request.overwrite) as outputs, _open_loras(fit) as stack:
        measurement = _measure(fit, folders, stack, running, fitting)
        record = make_record(fit, measurement, source)
        if request.topup and record.differs:
            multipliers = part_multipliers(fit, measurement)
            residual = StreamedResidual(fit.inputs, stack, multipliers, fit.options, measurement)
            private = top_up(outputs, fit, residual, source, request.topup, remaining)
            record = replace(record, topups=private)
        if request.overwrite:
            remove_earlier(outputs, fit, folders, record.topups)
        stage_fit(outputs, fit.run, record, format_fit(record, fit.run))
        progress.report("putting the files in place", 1.0)
    return record


def prepare_fit(request: FitRequest, folders: Folders) -> PreparedFit:
    """Returns the request with its run, files and free names; nothing is written.

    Raises:
        HyperMergeError: the request is refused by `validate_fit`, or a name is taken.
    """
    return with_free_names(validate_fit(request, folders), request, folders)


def fit_onto(run: Run, path: Path, folders: Folders, progress: Progress) -> FitRecord:
    """Returns the fit of a checkpoint onto the shared LoRAs of a run; nothing is written.

    Raises:
        HyperMergeError: an unknown run, one whose files are missing or were changed, a checkpoint
            of another family, a name that is taken, or the user's interrupt.
    """
    fit = validate_fit(FitRequest(run.name, path), folders)
    checking, running, fitting, _ = progress.split(_costs(fit, folders, private=False))
    source = check_sources(fit, folders, checking)
    with device_job(fit.options.device), _open_loras(fit) as stack:
        return make_record(fit, _measure(fit, folders, stack, running, fitting), source)


def _measure(
    fit: PreparedFit, folders: Folders, stack: LoraStack, running: Progress, fitting: Progress
) -> Measurement:
    """Measures the checkpoint in the metric of the run."""
    network = fit.network(folders)
    sensitivities = None
    if network is not None:
        base, _ = fit.inputs.read
        with CheckpointReader(base.path) as average:
            sensitivities = network.sensitivities(average.tensor, fit.options.device, running)
    choice = fit.run.recipe.layer_weights
    return measure(fit.inputs, stack, fit.options, choice, sensitivities, fitting)


def _open_loras(fit: PreparedFit) -> LoraStack:
    base, _ = fit.inputs.read
    return LoraStack(shared_files(fit.run), base, fit.inputs.layout)


def _costs(
    fit: PreparedFit, folders: Folders, *, private: bool
) -> tuple[float, float, float, float]:
    """Returns the costs of checking, running the average, fitting, and a private LoRA.

    The unit is that of `pass_costs`.
    """
    network = fit.network(folders)
    runs = network is not None and not network.is_known
    entries = sum(pass_costs(fit.inputs, PassOptions(fit.options.device)).values())
    loras = sum(path.stat().st_size for path in shared_files(fit.run) if path.exists())
    hashing = bytes_to_hash(fit.inputs.headers, folders.cache)
    return (
        HASHING_COST * (loras + hashing),
        measuring_cost(fit.inputs.layout) if runs else 0.0,
        entries,
        3 * entries if private else 0.0,
    )


def check_sources(fit: PreparedFit, folders: Folders, progress: Progress) -> SourceRecord:
    """Returns the file's hashes if the LoRAs are the run's own and its name is free.

    Args:
        fit: the fit.
        folders: with the cache of hashes.
        progress: progress and interrupt.

    Raises:
        RunError: a LoRA is missing, edited or replaced.
        NameTakenError: another file that the run was made of has the fit's name.
    """
    checking, hashing = progress.split([1.0, 1.0])
    require_own(fit.run, shared_files(fit.run), checking)
    (record,) = hash_sources(fit.inputs.headers, folders.cache, hashing)
    for source in fit.run.sources:
        if Path(source.name).stem == fit.name and source.sha256 != record.sha256:
            raise NameTakenError(
                f"{fit.name} is another {'LoRA' if fit.run.of_loras else 'checkpoint'} of the run"
                f" {fit.run.name}",
                hint="choose another name for this one",
            )
    return record


def part_multipliers(fit: PreparedFit, measurement: Measurement) -> dict[str, Tensor]:
    """Returns multipliers by the layers' part: of all LoRAs, then of all companions.

    A companion takes the UNet's multiplier of its LoRA.
    """
    report = fit.run.report
    with_companions = report.companion_owners
    owners = [*range(len(report.loras)), *with_companions]
    solved = {
        part: measurement.weighted.multipliers(members, owners)
        for part, members in fit.groups.items()
    }
    unet = solved["unet"]
    companions = unet[list(with_companions)]
    return {part: torch.cat([solved.get(part, unet), companions]) for part in PARTS}


def make_record(fit: PreparedFit, measurement: Measurement, source: SourceRecord) -> FitRecord:
    """Returns the record of a fit from what was measured."""
    multipliers = part_multipliers(fit, measurement)
    plain, weighted = measurement.plain, measurement.weighted
    energies, errors = plain.energies, plain.left(multipliers)
    inside, outside = float(energies.sum()), sum(measurement.outside.values())
    return FitRecord(
        run=fit.run.name,
        run_created=fit.run.created,
        created=current_time(),
        row=replace(
            _row(fit, multipliers, energies, errors, outside),
            explained_weighted=_explained(weighted.energies, weighted.left(multipliers)),
        ),
        path=str(fit.inputs.headers[0].path.absolute()),
        sha256=source.sha256,
        legacy_hash=source.legacy_hash,
        differs=inside > 0,
        not_carried={
            kind: energy / (inside + outside or 1.0) for kind, energy in measurement.outside.items()
        },
        parts=part_losses(plain.layers, energies, errors),
        recovered=tuple(
            CompanionGain(kind, _recovered(sums, multipliers["unet"]))
            for kind, sums in measurement.vectors.items()
        ),
    )


def _row(
    fit: PreparedFit,
    multipliers: Mapping[str, Tensor],
    energies: Tensor,  # (layers,), float64: squared norms of the differences
    errors: Tensor,  # (layers,), float64: squared norms of what is left of them
    outside: float,  # squared norm of the differences outside of the layers
) -> CheckpointReport:
    members = {"unet": [], "text_encoder": [], **fit.layers_of}
    everything = list(range(len(energies)))
    whole_share, unet, encoder = (
        _explained(energies[places], errors[places])
        for places in (everything, members["unet"], members["text_encoder"])
    )
    loras = len(fit.run.report.loras)
    text = multipliers["text_encoder"] if "text_encoder" in fit.groups else None
    return CheckpointReport(
        name=fit.name,
        explained=whole_share,
        explained_unet=unet,
        explained_text_encoder=encoder,
        error=max(1 - whole_share, 0.0) ** 0.5,
        not_carried=outside / (float(energies.sum()) + outside or 1.0),
        multipliers=tuple(multipliers["unet"][:loras].tolist()),
        text_multipliers=() if text is None else tuple(text[:loras].tolist()),
    )


def _explained(energies: Tensor, errors: Tensor) -> float:
    return 1 - share(errors.sum(), energies.sum())


def _recovered(sums: Sequence[Sums], multipliers: Tensor) -> float:
    left = sum(tensor.left(multipliers) for tensor in sums)
    return 1 - share(left, sum(tensor.energy for tensor in sums))
