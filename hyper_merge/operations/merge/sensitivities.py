"""Finds how much the output of the average's network depends on each layer: known, or measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hyper_merge.analysis.sensitivities import (
    read_sensitivities,
    sensitivities_path,
    write_sensitivities,
)
from hyper_merge.calibration.measure import can_run, measure_sensitivities
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.runtime.damaged_files import DamagedFiles
from hyper_merge.runtime.progress import Progress


def are_measured(preflight: Preflight) -> bool:
    """Tells whether a merge counts differences by runs of its average."""
    layout = preflight.inputs.layout
    return preflight.recipe.layer_weights == "output" and can_run(layout, _shapes(preflight))


def are_known(preflight: Preflight) -> bool:
    """Tells whether a merge need not run its average: an earlier one did, or it asks for none."""
    return not are_measured(preflight) or known_sensitivities(preflight) is not None


def known_sensitivities(
    preflight: Preflight, damaged: DamagedFiles | None = None
) -> Mapping[str, float] | None:
    """Returns the sensitivities by module that an earlier merge of the same average measured, if any.

    Args:
        preflight: the validated recipe.
        damaged: takes their file if it is damaged; None to leave it where it is.
    """
    if not are_measured(preflight):
        return None
    known = read_sensitivities(_path(preflight), damaged)
    modules = {layer.module for layer in preflight.inputs.layout.layers}
    return known if modules <= known.keys() else None


def find_sensitivities(
    preflight: Preflight, average: Callable[[str], Tensor], progress: Progress
) -> Mapping[str, float] | None:
    """Returns sensitivities by module, measured and remembered where they are not known.

    Args:
        preflight: the validated recipe.
        average: returns a tensor of the average by its key.
        progress: progress and interrupt.

    Returns:
        None where the recipe asks for none, or the network cannot be run.
    """
    known = known_sensitivities(preflight, DamagedFiles(progress.warn))
    if known is not None or not are_measured(preflight):
        return known
    measured = _measure(preflight, average, preflight.pass_options.device, progress)
    if not all(math.isfinite(value) for value in measured.values()) or not any(measured.values()):
        progress.warn(
            "the average's network gives no finite outputs, so its layers count by their size and"
            " positions"
        )
        return None
    write_sensitivities(_path(preflight), measured, progress.warn)
    return measured


def _measure(
    preflight: Preflight,
    average: Callable[[str], Tensor],
    device: torch.device,
    progress: Progress,
) -> dict[str, float]:
    """Measures on the device, or on the CPU where that has too little memory."""
    layout, seed = preflight.inputs.layout, preflight.recipe.seed
    shapes = _shapes(preflight)
    reached = [0.0]
    watched = progress.joined(Progress(lambda _phase, fraction: reached.append(fraction)))
    try:
        return measure_sensitivities(average, shapes, layout, device, watched, seed=seed)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        progress.warn(f"{device} has too little memory to run the average; the CPU runs it")
        cpu, rest = torch.device("cpu"), progress.part(reached[-1], 1.0)
        return measure_sensitivities(average, shapes, layout, cpu, rest, seed=seed)


def _path(preflight: Preflight) -> Path:
    """Returns the path of the sensitivities in the cache."""
    seed = preflight.recipe.seed
    return sensitivities_path(preflight.folders.cache, preflight.average_id, seed)


def _shapes(preflight: Preflight) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the average's tensors by key."""
    header = preflight.inputs.base or preflight.inputs.headers[0]
    return {key: info.shape for key, info in header.tensors.items()}
