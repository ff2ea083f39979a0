"""Fits a LoRA that was not shared onto a run's shared LoRAs: multipliers, and what they explain."""

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
from hyper_merge.checkpoints.io.transaction import FileTransaction, require_free
from hyper_merge.decomposition.linalg import block_gram
from hyper_merge.errors import MismatchError, OutputError, RecipeError
from hyper_merge.loras.input_lora import InputLora
from hyper_merge.loras.reader import LoraReader
from hyper_merge.loras.weighted_sum import OpenLora
from hyper_merge.operations.fit.fit import make_record
from hyper_merge.operations.fit.measurement import LayerSums, Measurement, Sums
from hyper_merge.operations.fit.request import FitRequest, PreparedFit
from hyper_merge.operations.loras.fit_text import format_lora_fit
from hyper_merge.operations.loras.inputs import LoraSet, read_loras
from hyper_merge.runs.fit_records import (
    FitRecord,
    fit_record_paths,
    require_own_record,
    stage_fit,
)
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.hash_cache import hash_sources
from hyper_merge.runs.integrity import require_family, require_own
from hyper_merge.runs.lora_runs import load_lora_run
from hyper_merge.runs.name_locks import Hold, held
from hyper_merge.runs.run import Run
from hyper_merge.runs.weighted_loras import shared_files
from hyper_merge.runtime.parallel import parallel_map
from hyper_merge.runtime.progress import Progress


def run_lora_fit(request: FitRequest, folders: Folders, progress: Progress) -> FitRecord:
    """Fits a LoRA and writes its record and text, both or none.

    Args:
        request: run, file and options; `topup` must be None.
        folders: where the run is, and its LoRAs.
        progress: progress and interrupt.

    Raises:
        HyperMergeError: a run whose files are missing or were changed, a file that is no LoRA or of
            another family, a name that is taken, a full disk, or the user's interrupt.
    """
    if request.topup is not None:
        raise RecipeError(
            "a topup goes with runs of checkpoints, and this is one of LoRAs",
            hint="leave it out, or share the LoRAs anew with this one",
            key="topup",
        )
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
        _require_free_names(run, name, overwrite=request.overwrite)
        checking, hashing, measuring = progress.split((2.0, 1.0, 2.0))
        require_own(run, shared_files(run), checking)
        (source,) = hash_sources(loras.headers, folders.cache, hashing)
        fit = _prepared(run, name, loras)
        record = make_record(fit, _measure(fit, loras, measuring), source)
        with FileTransaction(overwrite=request.overwrite) as outputs:
            stage_fit(outputs, run, record, format_lora_fit(record, run))
            progress.report("putting the files in place", 1.0)
    return record


def _require_free_names(run: Run, name: str, *, overwrite: bool) -> None:
    paths = fit_record_paths(run, name)
    if paths[0].parent.is_symlink():
        raise OutputError(f"{paths[0].parent} is a link, and links are not followed")
    require_own_record(run, name)
    for path in paths:
        require_free(path, overwrite=overwrite)


def _prepared(run: Run, name: str, loras: LoraSet) -> PreparedFit:
    family = require_family(run)
    modules = set(loras.files[0].layers)
    for path in shared_files(run):
        with LoraReader(path, family) as lora:
            modules |= set(lora.modules)
    layers = tuple(
        replace(layer, is_end=False, whole=False)
        for layer in loras.known.layers
        if layer.module in modules
    )
    inputs = replace(loras, layers=layers).inputs(torch.float32)
    separate = any(row.text_multipliers for row in run.report.checkpoints)
    return PreparedFit(
        run=run,
        name=name,
        inputs=inputs,
        options=PassOptions(torch.device("cpu")),
        groups=multiplier_groups(layers, separate=separate),
    )


def _measure(fit: PreparedFit, loras: LoraSet, progress: Progress) -> Measurement:
    layers = fit.inputs.layout.layers
    counter = progress.counter(
        "fitting", {layer.module: float(layer.m + layer.n) for layer in layers}
    )
    sums: list[Sums] = []
    with ExitStack() as stack:
        family = require_family(fit.run)
        target = stack.enter_context(InputLora(loras.files[0]))
        files = [stack.enter_context(LoraReader(path, family)) for path in shared_files(fit.run)]
        parallel = stack.enter_context(parallel_map(torch.device("cpu"), counter.report))
        stack.enter_context(counter)
        take = partial(_sums, target, files)
        for layer, part in zip(layers, parallel(take, layers), strict=True):
            sums.append(part)
            counter.finish(layer.module)
    sizes = torch.tensor([layer.m for layer in layers], dtype=torch.float64)
    metrics = layer_metrics(fit.run.recipe.layer_weights, sizes, layers, None)
    weighted = [part.scaled(metric.scale) for part, metric in zip(sums, metrics, strict=True)]
    return Measurement(
        LayerSums(tuple(sums), layers), LayerSums(tuple(weighted), layers), metrics, {}, {}
    )


def _sums(target: OpenLora, files: Sequence[OpenLora], layer: Layer) -> Sums:
    """Returns the inner products of the new LoRA and of the shared ones, from factors alone."""
    pairs = [_pair(file, layer) for file in (target, *files)]
    gram = block_gram(*zip(*pairs, strict=True))
    return Sums(float(gram[0, 0]), gram[0, 1:], gram[1:, 1:])


def _pair(file: OpenLora, layer: Layer) -> tuple[Tensor, Tensor]:
    if layer.module in file.modules:
        file.require_layer(layer)
        return file.factors(layer.module)
    return torch.zeros(layer.m, 0).double(), torch.zeros(0, layer.n).double()
