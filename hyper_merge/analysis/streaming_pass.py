"""The one pass over the checkpoints: averages out, compressed deviations in.

Every tensor is read once from all files and taken apart by one pure function; the average goes to
one sink, bases and cores of the layers to another. Memory holds few tensors of each checkpoint.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, NoReturn

import torch
from torch import Tensor

from hyper_merge.analysis.inputs import Sources
from hyper_merge.checkpoints.architectures.layout import (
    Treatment,
    is_position_ids,
    kind_of,
    position_ids,
)
from hyper_merge.checkpoints.reader import Checkpoint
from hyper_merge.decomposition.bounds import Spectra, spectra
from hyper_merge.decomposition.compression import Compressed, compress, compression_cost, project
from hyper_merge.decomposition.contrasts import Contrasts, Deviations, deviations, energies
from hyper_merge.errors import NonFiniteError, RecipeError
from hyper_merge.runtime.parallel import workers
from hyper_merge.runtime.progress import Control

_CHUNK: Final = 2**17  # entries that a CPU's cache holds of several checkpoints at once

# What an entry of a file, or of a symmetric matrix cubed, takes: in multiply-adds of large products.
_ENTRY: Final = 900.0
_EIGENVALUES: Final = 6.0


@dataclass(frozen=True)
class Work:
    """How the pass works: place, dice, and sizes."""

    device: torch.device
    seed: int = 0
    width: int | None = None  # columns of the bases at most; None for the average alone
    widths: tuple[int, ...] = ()  # per layer, where they differ: `width` is then about their mean

    def width_of(self, index: int) -> int:
        """Columns of a layer's bases at most."""
        return self.widths[index] if self.widths else self.width or 0


@dataclass(frozen=True, eq=False)
class LayerAnalysis:
    """What the pass finds out about one layer."""

    index: int  # among the layout's layers
    gram: Tensor  # (d + 1, d + 1), float64, see `Deviations`
    compressed: Compressed
    rounding: Tensor  # (p, q): the average's rounding error in the layer's bases
    spectra: Spectra
    weight: float  # squared norm of the average's own matrix


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
        control: progress by what tensors cost; asked to stop between tensors and within them.

    Returns:
        The energy of what no LoRA carries, by kind ("norms", "VAE", ...) and checkpoint.

    Raises:
        NonFiniteError: a tensor that is to be averaged holds NaN or infinity.
        CheckpointError: a file was changed or cannot be read.
    """
    phase = "averaging" if work.width is None else "reading and analysing"
    costs = pass_costs(sources, work)
    tally = control.tally(phase, costs)
    not_carried: dict[str, Tensor] = {}
    with ExitStack() as stack:
        files = [
            stack.enter_context(Checkpoint(header.path, expected=header)) for header in sources.read
        ]
        if write_average:
            _copy(sources, files[-len(sources.headers)], write_average)
        each = stack.enter_context(workers(work.device, tally.tell))
        stack.enter_context(tally)

        def take(key: str) -> Found:
            tensors = [file.tensor(key) for file in files]
            return take_apart(sources, key, tensors, work, partial(tally.add, key))

        for key, found in zip(costs, each(take, costs), strict=True):
            if write_average:
                write_average(key, found.average)
            for layer in found.layers:
                keep_layer(layer)
            kind = kind_of(key, sources.layout)
            not_carried[kind] = not_carried.get(kind, 0) + found.energies
            if found.warning:
                control.warn(found.warning)
            tally.finish(key)
    not_carried.pop("layers", None)
    return not_carried


def pass_costs(sources: Sources, work: Work) -> dict[str, float]:
    """What each tensor of the pass takes, in multiply-adds of large products, nearly."""
    layout, count = sources.layout, len(sources.read)
    costs = {
        key: _ENTRY * count * sources.headers[0].tensors[key].numel
        for key, how in layout.treatments.items()
        if _is_averaged(how)
    }
    if work.width is None:
        return costs
    contrasts = sources.contrasts
    for index, layer in enumerate(layout.layers):
        width = work.width_of(index)
        shape = (contrasts.dimensions + 1, layer.m, layer.n)  # the rounding is projected too
        costs[layer.key] += compression_cost(shape, width)
        costs[layer.key] += _EIGENVALUES * (contrasts.count + 2) * min(width, layer.m, layer.n) ** 3
    return costs


def take_apart(
    sources: Sources,
    key: str,
    tensors: Sequence[Tensor],
    work: Work,
    tick: Callable[[float], None] = lambda _cost: None,
) -> Found:
    """Everything about one tensor of all files: a pure function, picklable with its arguments.

    Where the device has too little memory the CPU takes the tensor, and a warning says so.

    Args:
        sources: the files; nothing is read here.
        key: the tensor's name.
        tensors: the tensor in every file of `sources.read`, on the CPU, as stored.
        work: width of the bases, device, seed.
        tick: told what each step cost, all together about `pass_costs`; may raise, to stop.
    """
    try:
        return _taken_apart(sources, key, tensors, work, tick)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        work_on_cpu = replace(work, device=torch.device("cpu"))
        found = _taken_apart(sources, key, tensors, work_on_cpu, tick)
        warning = f"{work.device} has too little memory for some layers; the CPU took them"
        return replace(found, warning=warning)


def _taken_apart(
    sources: Sources,
    key: str,
    tensors: Sequence[Tensor],
    work: Work,
    tick: Callable[[float], None],
) -> Found:
    contrasts = sources.contrasts_of(sources.layout.treatments[key])
    averages, layers = [], []
    total: Tensor | int = 0
    for rows, index in sources.pieces(key):
        parts = [tensor[rows] for tensor in tensors]
        found = _deviations(sources, key, parts, contrasts, work, tick)
        averages.append(found.base)
        total = total + energies(found.gram, contrasts)
        if index is not None and work.width is not None:
            layers.append(_analysis(found, sources, index, work, tick))
    average = torch.cat(averages).view(tensors[0].shape)
    return Found(average, torch.as_tensor(total), tuple(layers))


def _is_averaged(treatment: Treatment) -> bool:
    return treatment in (Treatment.LAYER, Treatment.AVERAGE, Treatment.VAE)


def _copy(sources: Sources, first: Checkpoint, write: Callable[[str, Tensor], None]) -> None:
    for key, info in sources.outputs().items():
        if sources.layout.treatments[key] is Treatment.COPY:
            write(key, position_ids(info.shape) if is_position_ids(key) else first.tensor(key))


def _deviations(
    sources: Sources,
    key: str,
    tensors: Sequence[Tensor],
    contrasts: Contrasts,
    work: Work,
    tick: Callable[[float], None],
) -> Deviations:
    origin, *others = [tensor.flatten().to(work.device, non_blocking=True) for tensor in tensors]
    chunk = _CHUNK if work.device.type == "cpu" else origin.numel()
    stored = origin.dtype if sources.base else sources.dtype  # a given base stays as it is
    cost = _ENTRY * len(tensors)
    found = deviations(
        origin, others, contrasts, stored, chunk, lambda entries: tick(cost * entries)
    )
    if not bool(found.gram.isfinite().all()):
        refuse_non_finite(sources, key, tensors)
    return found


def refuse_non_finite(sources: Sources, key: str, tensors: Sequence[Tensor]) -> NoReturn:
    """Says which of the files spoils a tensor whose sums are not finite.

    Raises:
        NonFiniteError: a file holds NaN or infinity there.
        RecipeError: none does: the average is too large for its type.
    """
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


def _analysis(
    found: Deviations,
    sources: Sources,
    index: int,  # of the layer
    work: Work,
    tick: Callable[[float], None],
) -> LayerAnalysis:
    layer = sources.layout.layers[index]
    slices = found.slices.view(len(found.slices), layer.m, layer.n)
    # A stream of random numbers for each layer: the order of the work does not matter.
    generator = torch.Generator().manual_seed(work.seed ^ zlib.crc32(layer.module.encode()))
    compressed = compress(slices, found.gram[:-1, :-1], work.width_of(index), generator, tick)
    error = found.rounding.view(1, layer.m, layer.n)
    return LayerAnalysis(
        index=index,
        gram=found.gram,
        compressed=compressed,
        rounding=project(error, compressed.left, compressed.right, tick)[0],
        spectra=spectra(compressed.core, sources.contrasts.to_deviations),
        weight=float(found.base.double().square().sum()),
    )
