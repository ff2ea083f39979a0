"""Fits a LoRA that was not shared onto a run's shared LoRAs: multipliers, error, private LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hyper_merge.analysis.inputs import multiplier_groups
from hyper_merge.analysis.loss_weights import layer_metrics
from hyper_merge.analysis.streaming_pass import PassOptions
from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.decomposition.linalg import block_gram
from hyper_merge.errors import MismatchError
from hyper_merge.loras.input_lora import InputLora
from hyper_merge.loras.reader import LoraReader
from hyper_merge.loras.weighted_sum import OpenLora
from hyper_merge.operations.fit.fit import check_sources, make_record, part_multipliers
from hyper_merge.operations.fit.measurement import LayerSums, Measurement, Sums
from hyper_merge.operations.fit.names import remove_earlier, with_free_names
from hyper_merge.operations.fit.request import FitRequest, PreparedFit
from hyper_merge.operations.fit.top_up import top_up
from hyper_merge.operations.loras.fit_text import format_lora_fit
from hyper_merge.operations.loras.inputs import LoraSet, read_loras
from hyper_merge.operations.loras.residual import FactoredResidual
from hyper_merge.runs.fit_records import FitRecord, stage_fit
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.integrity import require_family
from hyper_merge.runs.lora_runs import load_lora_run
from hyper_merge.runs.name_locks import Hold, held
from hyper_merge.runs.weighted_loras import shared_files
from hyper_merge.runtime.parallel import parallel_map
from hyper_merge.runtime.progress import Progress


def run_lora_fit(request: FitRequest, folders: Folders, progress: Progress) -> FitRecord:
    """Fits a LoRA and writes record, text and perhaps a private LoRA, all or none.

    Args:
        request: run, file and options; the device has no effect.
        folders: where the run is, and its LoRAs.
        progress: progress and interrupt.

    Raises:
        HyperMergeError: a run whose files are missing or were changed, a file that is no LoRA or of
            another family, a name that is taken, a full disk, or the user's interrupt.
    """
    run = load_lora_run(folders, request.run)
    loras = read_loras([request.checkpoint], accepts_damaged=request.damaged == "accept")
    for warning in loras.warnings:
        progress.warn(warning)
    if loras.family.name != require_family(run).name:
        raise MismatchError(
            f"{loras.headers[0].name} is a LoRA of {loras.family.title}, and the run {run.name} of"
            f" {run.family}",
            hint="choose a LoRA of the same base",
        )
    name = request.name or loras.headers[0].stem
    holds = (Hold("run", run.name, shared=True), Hold("fit", f"{run.name} {name}"))
    with held(folders.runs, *holds):
        fit = PreparedFit(
            run=run,
            name=name,
            inputs=loras.inputs(torch.float32),
            options=PassOptions(torch.device("cpu")),
            groups={},
        )
        fit = with_free_names(fit, request, folders)
        return _write_fit(request, fit, loras, folders, progress)


def _write_fit(
    request: FitRequest, fit: PreparedFit, loras: LoraSet, folders: Folders, progress: Progress
) -> FitRecord:
    """Fits the LoRA and writes everything, with all names held."""
    run, family = fit.run, require_family(fit.run)
    costs = (3.0, 2.0, 8.0 if request.topup else 0.0)
    checking, measuring, remaining = progress.split(costs)
    source = check_sources(fit, folders, checking)
    fit = _with_shared_layers(fit, loras)
    layers = fit.inputs.layout.layers
    with FileTransaction(overwrite=request.overwrite) as outputs, ExitStack() as stack:
        target = stack.enter_context(InputLora(loras.files[0]))
        shared = [stack.enter_context(LoraReader(path, family)) for path in shared_files(run)]
        measurement = _measure(fit, (target, *shared), measuring)
        record = make_record(fit, measurement, source)
        if request.topup and record.differs:
            multipliers = part_multipliers(fit, measurement)
            residual = FactoredResidual(layers, target, shared, multipliers, measurement)
            private = top_up(outputs, fit, residual, source, request.topup, remaining)
            record = replace(record, topups=private)
        if request.overwrite:
            remove_earlier(outputs, fit, folders, record.topups)
        stage_fit(outputs, run, record, format_lora_fit(record, run))
        progress.report("putting the files in place", 1.0)
    return record


def _with_shared_layers(fit: PreparedFit, loras: LoraSet) -> PreparedFit:
    """Returns the fit in the layers of the LoRA and of the shared ones, whose files are there."""
    run, family = fit.run, require_family(fit.run)
    modules = set(loras.files[0].layers)
    for path in shared_files(run):
        with LoraReader(path, family) as lora:
            modules |= set(lora.modules)
    layers = tuple(
        replace(layer, is_end=False, whole=False) for layer in loras.known.with_bundles(modules)
    )
    inputs = replace(loras, layers=layers).inputs(torch.float32)
    separate = any(row.text_multipliers for row in run.report.checkpoints)
    return replace(fit, inputs=inputs, groups=multiplier_groups(layers, separate=separate))


def _measure(fit: PreparedFit, files: Sequence[OpenLora], progress: Progress) -> Measurement:
    """Measures the first file by the others, which are open."""
    layers = fit.inputs.layout.layers
    counter = progress.counter(
        "fitting", {layer.module: float(layer.m + layer.n) for layer in layers}
    )
    sums: list[Sums] = []
    take = partial(_sums, files)
    with parallel_map(torch.device("cpu"), counter.report) as parallel, counter:
        for layer, part in zip(layers, parallel(take, layers), strict=True):
            sums.append(part)
            counter.finish(layer.module)
    sizes = torch.tensor([layer.m for layer in layers], dtype=torch.float64)
    metrics = layer_metrics(fit.run.recipe.layer_weights, sizes, layers, None)
    weighted = [part.scaled(metric.scale) for part, metric in zip(sums, metrics, strict=True)]
    return Measurement(
        LayerSums(tuple(sums), layers), LayerSums(tuple(weighted), layers), metrics, {}, {}
    )


def _sums(files: Sequence[OpenLora], layer: Layer) -> Sums:
    """Returns the inner products of the first file and of the others, from factors alone."""
    pairs = [_pair(file, layer) for file in files]
    gram = block_gram(*zip(*pairs, strict=True))
    return Sums(float(gram[0, 0]), gram[0, 1:], gram[1:, 1:])


def _pair(file: OpenLora, layer: Layer) -> tuple[Tensor, Tensor]:
    if layer.module in file.modules:
        file.require_layer(layer)
        return file.factors(layer.module)
    return torch.zeros(layer.m, 0).double(), torch.zeros(0, layer.n).double()
