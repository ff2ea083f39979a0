"""The one pass over the checkpoints: averages out, compressed deviations in.

Every tensor is read once from all files and taken apart by one pure function; the average goes to
one sink, bases and cores of the layers to another. Memory holds few tensors of each checkpoint.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from hyper_merge.checkpoints.layers import (
    Layer,
    Treatment,
    is_position_ids,
    kind_of,
    position_ids,
)
from hyper_merge.checkpoints.reader import Checkpoint
from hyper_merge.control import Control
from hyper_merge.decomposition.bounds import Spectra, spectra
from hyper_merge.decomposition.contrasts import Contrasts, Deviations, deviations, energies
from hyper_merge.decomposition.core import Compressed, compress, project
from hyper_merge.errors import NonFiniteError, RecipeError
from hyper_merge.sources import Sources
from hyper_merge.workers import workers

_CHUNK: Final = 2**17  # entries that a CPU's cache holds of several checkpoints at once


@dataclass(frozen=True)
class Work:
    """How the pass works: place, dice, and sizes."""

    device: torch.device
    seed: int = 0
    width: int | None = None  # columns of the bases at most; None for the average alone


@dataclass(frozen=True, eq=False)
class LayerAnalysis:
    """What the pass finds out about one layer."""

    index: int  # among the layout's layers
    gram: Tensor  # (d + 1, d + 1), float64, see `Deviations`
    compressed: Compressed
    rounding: Tensor  # (p, q): the average's rounding error in the layer's bases
    spectra: Spectra


@dataclass(frozen=True, eq=False)
class Found:
    """What the pass finds out about one tensor."""

    average: Tensor  # as it will be stored
    energies: Tensor  # (k,): squared distances of the checkpoints from it
    layers: tuple[LayerAnalysis, ...]  # none for a tensor that no LoRA carries
    warning: str | None = None


def run_pass(
    sources: Sources,
    work: Work,
    write_average: Callable[[str, Tensor], None] | None,
    keep_layer: Callable[[LayerAnalysis], None],
    control: Control,
) -> dict[str, Tensor]:  # kind -> (k,), float64
    """Reads every tensor of all files once.

    Args:
        sources: the files.
        work: width of the bases, device, seed.
        write_average: takes each tensor of the average; None if it is not wanted.
        keep_layer: takes the analysis of each layer; never called without a width.
        control: progress by tensor sizes; asked to stop between tensors.

    Returns:
        The energy of what no LoRA carries, by kind ("norms", "VAE", ...) and checkpoint.

    Raises:
        NonFiniteError: a tensor that is to be averaged holds NaN or infinity.
        CheckpointError: a file was changed or cannot be read.
    """
    phase = "averaging" if work.width is None else "reading and analysing"
    keys = [key for key, how in sources.layout.treatments.items() if _is_averaged(how)]
    sizes = [sources.headers[0].tensors[key].numel for key in keys]
    not_carried: dict[str, Tensor] = {}
    done = 0
    with ExitStack() as stack:
        files = [
            stack.enter_context(Checkpoint(header.path, expected=header)) for header in sources.read
        ]
        if write_average:
            _copy(sources, files[-len(sources.headers)], write_average)
        each = stack.enter_context(workers(work.device))

        def take(key: str) -> Found:
            return take_apart(sources, key, [file.tensor(key) for file in files], work)

        for key, size, found in zip(keys, sizes, each(take, keys), strict=True):
            if write_average:
                write_average(key, found.average)
            for layer in found.layers:
                keep_layer(layer)
            kind = kind_of(key, sources.layout)
            not_carried[kind] = not_carried.get(kind, 0) + found.energies
            if found.warning:
                control.warn(found.warning)
            done += size
            control.step(phase, done / sum(sizes))
    not_carried.pop("layers", None)
    return not_carried


def take_apart(sources: Sources, key: str, tensors: Sequence[Tensor], work: Work) -> Found:
    """Everything about one tensor of all files: a pure function, picklable with its arguments.

    Where the device has too little memory the CPU takes the tensor, and a warning says so.

    Args:
        sources: the files; nothing is read here.
        key: the tensor's name.
        tensors: the tensor in every file of `sources.read`, on the CPU, as stored.
        work: width of the bases, device, seed.
    """
    try:
        return _taken_apart(sources, key, tensors, work)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        found = _taken_apart(sources, key, tensors, replace(work, device=torch.device("cpu")))
        warning = f"{work.device} has too little memory for some layers; the CPU took them"
        return replace(found, warning=warning)


def _taken_apart(sources: Sources, key: str, tensors: Sequence[Tensor], work: Work) -> Found:
    contrasts = sources.contrasts_of(sources.layout.treatments[key])
    averages, layers = [], []
    total: Tensor | int = 0
    for rows, index in sources.pieces(key):
        found = _deviations(sources, key, [tensor[rows] for tensor in tensors], contrasts, work)
        averages.append(found.base)
        total = total + energies(found.gram, contrasts)
        if index is not None and work.width is not None:
            layer = _analysis(found, sources.layout.layers[index], contrasts, work)
            layers.append(replace(layer, index=index))
    average = torch.cat(averages).view(tensors[0].shape)
    return Found(average, torch.as_tensor(total), tuple(layers))


def _is_averaged(treatment: Treatment) -> bool:
    return treatment in (Treatment.LAYER, Treatment.AVERAGE, Treatment.VAE)


def _copy(sources: Sources, first: Checkpoint, write: Callable[[str, Tensor], None]) -> None:
    for key, info in sources.outputs().items():
        if sources.layout.treatments[key] is Treatment.COPY:
            write(key, position_ids(info.shape) if is_position_ids(key) else first.tensor(key))


def _deviations(
    sources: Sources, key: str, tensors: Sequence[Tensor], contrasts: Contrasts, work: Work
) -> Deviations:
    origin, *others = [tensor.flatten().to(work.device, non_blocking=True) for tensor in tensors]
    chunk = _CHUNK if work.device.type == "cpu" else origin.numel()
    stored = origin.dtype if sources.base else sources.dtype  # a given base stays as it is
    found = deviations(origin, others, contrasts, stored, chunk)
    if not bool(found.gram.isfinite().all()):
        _refuse_non_finite(sources, key, tensors)
    return found


def _refuse_non_finite(sources: Sources, key: str, tensors: Sequence[Tensor]) -> None:
    for header, tensor in zip(sources.read, tensors, strict=True):
        bad = int((~tensor.float().isfinite()).sum())
        if bad:
            raise NonFiniteError(
                f"{header.name} holds NaN or infinity in {bad} of {tensor.numel()} values of"
                f" {key}; use an undamaged copy of the file, or leave it out"
            )
    raise RecipeError(
        f"the average of {key} is too large for {str(sources.dtype).removeprefix('torch.')};"
        " choose dtype bfloat16 or float32"
    )


def _analysis(found: Deviations, layer: Layer, contrasts: Contrasts, work: Work) -> LayerAnalysis:
    slices = found.slices.view(len(found.slices), layer.m, layer.n)
    # A stream of random numbers for each layer: the order of the work does not matter.
    generator = torch.Generator().manual_seed(work.seed ^ zlib.crc32(layer.module.encode()))
    compressed = compress(slices, found.gram[:-1, :-1], work.width or 0, generator)
    error = found.rounding.view(1, layer.m, layer.n)
    return LayerAnalysis(
        index=-1,
        gram=found.gram,
        compressed=compressed,
        rounding=project(error, compressed.left, compressed.right)[0],
        spectra=spectra(compressed.core, contrasts.to_deviations),
    )
