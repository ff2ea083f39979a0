"""Passes once over the checkpoints for their average and their compressed deviations.

Every tensor is read once from all files and analysed by one pure function; the average goes to one
function, the layers to another. Memory holds few tensors of each checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, NoReturn

import torch
from torch import Tensor

from hyper_merge.analysis.damaged_tensors import Damage, DamagedTensors
from hyper_merge.analysis.device_bytes import HOST_CHUNK, IN_FLIGHT, host_bytes, pass_bytes
from hyper_merge.analysis.inputs import MergeInputs, open_checkpoints
from hyper_merge.analysis.layer_analysis import LayerAnalysis, analyze_layer
from hyper_merge.checkpoints.architectures.layout import (
    Treatment,
    is_position_ids,
    kind_of_tensor,
    position_ids,
)
from hyper_merge.decomposition.compression import (
    compression_cost,
)
from hyper_merge.decomposition.contrasts import (
    Contrasts,
    TensorDeviations,
    compute_deviations,
    energies,
    leading_directions,
)
from hyper_merge.errors import NonFiniteError, RecipeError
from hyper_merge.runtime.devices import try_device
from hyper_merge.runtime.parallel import MemoryLimit, parallel_map
from hyper_merge.runtime.progress import Progress, ProgressCounter

_GPU_CHUNK: Final = 2**22  # entries that keep a GPU busy

_ENTRY: Final = 1350.0  # cost of an entry of a file, in multiply-adds of large products
# Of a layer, whatever its size, bases and eigenvalues of small matrices; below a size less.
_LAYER: Final = 3e9
_SMALL: Final = 64


@dataclass(frozen=True)
class PassOptions:
    """The device, the seed of random numbers, and the sizes of a pass."""

    device: torch.device
    seed: int = 0
    width: int | None = None  # columns of the bases at most; None for the average alone
    widths: tuple[int, ...] = ()  # per layer, where they differ: `width` is then about their mean
    # (d, any), among slices of many checkpoints: those that hold most in all layers together
    directions: Tensor | None = field(default=None, compare=False)
    # bytes of a CPU's memory that tensors take which are analysed at a time; one may take more
    in_flight: int = field(default=IN_FLIGHT, compare=False)

    def width_of(self, index: int) -> int:
        """Returns the most columns that a layer's bases have."""
        return self.widths[index] if self.widths else self.width or 0


@dataclass(frozen=True, eq=False)
class TensorAnalysis:
    """The result of the pass for one tensor."""

    average: Tensor  # as it will be stored
    energies: Tensor  # (k,): squared distances of the checkpoints from it
    layers: tuple[LayerAnalysis, ...]  # none for a tensor that no LoRA carries
    warning: str | None = None


AnalyzedTensor = tuple[TensorAnalysis, tuple[Damage, ...]]
"""The result of the pass for one tensor, and what of it looks damaged."""

AnalyzeTensors = Callable[
    [MergeInputs, PassOptions, Mapping[str, float], ProgressCounter],
    AbstractContextManager[Iterator[AnalyzedTensor]],
]
"""Analyses tensors of all files, given by key with their costs; gives the results in this order."""


@contextmanager
def analyze_in_threads(
    inputs: MergeInputs,
    options: PassOptions,
    costs: Mapping[str, float],
    counter: ProgressCounter,
) -> Iterator[Iterator[AnalyzedTensor]]:
    """Analyses the tensors in threads of this process (an `AnalyzeTensors`)."""
    damaged = DamagedTensors(inputs)
    memory, on_host = MemoryLimit(options.in_flight), options.device.type == "cpu"
    with (
        open_checkpoints(inputs.read) as files,
        parallel_map(options.device, counter.report) as parallel,
        counter,
    ):

        def analyze(key: str) -> AnalyzedTensor:
            tensors = [file.tensor(key) for file in files]
            damages = damaged.find(key, tensors)
            tick = partial(counter.add, key)
            nbytes = host_bytes(inputs, key, options.width_of) if on_host else 0
            with memory.holding(nbytes):
                return analyze_tensor(inputs, key, tensors, options, tick), damages

        yield parallel(analyze, costs)


def stream_layers(
    inputs: MergeInputs,
    options: PassOptions,
    write_average: Callable[[str, Tensor], None] | None,
    keep_layer: Callable[[LayerAnalysis], None] | None,
    progress: Progress,
    analyze_tensors: AnalyzeTensors = analyze_in_threads,
) -> dict[str, Tensor]:  # kind -> (k,), float64
    """Reads every tensor of all files once.

    Args:
        inputs: the files.
        options: width of the bases, device, seed.
        write_average: takes each tensor of the average; None if it is not needed.
        keep_layer: takes the analysis of each layer; None if they are not needed.
        progress: progress by the costs of the tensors; checked between tensors and within them.
        analyze_tensors: does the work on the tensors, here or elsewhere.

    Returns:
        The energies (k,) of what no LoRA carries, by kind ("norms", "VAE", ...).

    Raises:
        NonFiniteError: a tensor that is to be averaged holds NaN or infinity.
        CheckpointError: a file was changed, cannot be read, or is damaged (`DamagedTensors`).
    """
    phase = "averaging" if options.width is None else "reading and analysing"
    costs = pass_costs(inputs, options)
    counter = progress.counter(phase, costs)
    not_carried: dict[str, Tensor] = {}
    damaged = DamagedTensors(inputs)
    if write_average:
        _copy_tensors(inputs, write_average)
    with analyze_tensors(inputs, options, costs, counter) as results:
        for key, (tensor, damages) in zip(costs, results, strict=True):
            damaged.add(key, damages)
            if write_average:
                write_average(key, tensor.average)
            if keep_layer:
                for layer in tensor.layers:
                    keep_layer(layer)
            kind = kind_of_tensor(key, inputs.layout)
            not_carried[kind] = not_carried.get(kind, 0) + tensor.energies
            if tensor.warning:
                progress.warn(tensor.warning)
            counter.finish(key)
    damaged.report(progress.warn)
    not_carried.pop("layers", None)
    return not_carried


def pass_costs(inputs: MergeInputs, options: PassOptions) -> dict[str, float]:
    """Returns the approximate cost of each tensor of the pass, in multiply-adds of large products."""
    layout, count = inputs.layout, len(inputs.read)
    costs = {
        key: _ENTRY * count * inputs.headers[0].tensors[key].numel
        for key, treatment in layout.treatments.items()
        if _is_averaged(treatment)
    }
    if options.width is None:
        return costs
    contrasts = inputs.contrasts
    for index, layer in enumerate(layout.layers):
        width = options.width_of(index)
        shape = (contrasts.kept + 1, layer.m, layer.n)  # the rounding is projected too
        costs[layer.key] += _LAYER * min(layer.m, layer.n, _SMALL) / _SMALL
        costs[layer.key] += compression_cost(shape, width)
        if not contrasts.are_few:  # inner products first, then what is kept
            costs[layer.key] += _ENTRY * count * layer.m * layer.n
    return costs


def analyze_tensor(
    inputs: MergeInputs,
    key: str,
    tensors: Sequence[Tensor],
    options: PassOptions,
    tick: Callable[[float], None] = lambda _cost: None,
) -> TensorAnalysis:
    """Averages and analyses one tensor of all files: a pure function, picklable with its arguments.

    Where the device cannot do it the CPU takes the tensor, and a warning says so.

    Args:
        inputs: the files; nothing is read here.
        key: the tensor's key.
        tensors: the tensor in every file of `inputs.read`, on the CPU, as stored.
        options: width of the bases, device, seed.
        tick: called with the cost of each step, together about `pass_costs`; may raise, to stop.

    Raises:
        NonFiniteError: a file holds NaN or infinity in the tensor.
        RecipeError: the average is too large for its type.
    """

    def analyze(device: torch.device) -> TensorAnalysis:
        return _analyze(inputs, key, tensors, replace(options, device=device), tick)

    failures: list[str] = []
    nbytes = pass_bytes(inputs, key, options.width or 0, _GPU_CHUNK)
    result = try_device(options.device, analyze, nbytes, failures.append)
    warnings = [f"{failure} for some layers; the CPU took them" for failure in failures]
    return replace(result, warning=next(iter(warnings), None))


def _analyze(
    inputs: MergeInputs,
    key: str,
    tensors: Sequence[Tensor],
    options: PassOptions,
    tick: Callable[[float], None],
) -> TensorAnalysis:
    contrasts = inputs.contrasts_of(key)
    averages, layers = [], []
    total: Tensor | int = 0
    for rows, index in inputs.pieces(key):
        parts = [tensor[rows] for tensor in tensors]
        is_analyzed = index is not None and options.width is not None
        deviate = partial(_deviations, inputs, key, parts, options=options, tick=tick)
        deviations = deviate(contrasts, keep=is_analyzed and contrasts.are_few)
        averages.append(deviations.base.cpu())
        total = total + energies(deviations.gram, contrasts)
        if index is None or not is_analyzed:
            continue
        directions = None
        if not contrasts.are_few:
            gram = deviations.gram
            directions = leading_directions(gram[:-1, :-1], options.directions, contrasts.kept)
            deviations = replace(deviate(contrasts.along(directions), keep=True), gram=gram)
        width, seed = options.width_of(index), options.seed
        layers.append(analyze_layer(deviations, directions, inputs, index, width, seed, tick))
    average = torch.cat(averages).view(tensors[0].shape)
    return TensorAnalysis(average, torch.as_tensor(total), tuple(layers))


def _is_averaged(treatment: Treatment) -> bool:
    return treatment in (Treatment.LAYER, Treatment.AVERAGE, Treatment.VAE)


def _copy_tensors(inputs: MergeInputs, write: Callable[[str, Tensor], None]) -> None:
    """Writes what the average takes from the first checkpoint as it is, and position ids as they are."""
    treatments = inputs.layout.treatments
    copied = {k: info for k, info in inputs.outputs().items() if treatments[k] is Treatment.COPY}
    positions = {key: info for key, info in copied.items() if is_position_ids(key)}
    for key, info in positions.items():
        write(key, position_ids(info.shape))
    if others := copied.keys() - positions.keys():
        with open_checkpoints(inputs.headers[:1]) as (first,):
            for key in sorted(others):
                write(key, first.tensor(key))


def _deviations(
    inputs: MergeInputs,
    key: str,
    tensors: Sequence[Tensor],
    contrasts: Contrasts,
    options: PassOptions,
    tick: Callable[[float], None],
    *,
    keep: bool,
) -> TensorDeviations:
    origin, *others = (tensor.flatten() for tensor in tensors)
    chunk = HOST_CHUNK if options.device.type == "cpu" else _GPU_CHUNK
    dtype = origin.dtype if inputs.base else inputs.dtype  # a base of the user stays as it is
    cost = _ENTRY * len(tensors)

    def on_chunk(entries: float) -> None:
        tick(cost * entries)

    deviations = compute_deviations(
        origin, others, contrasts, dtype, chunk, on_chunk, options.device, keep=keep
    )
    if not bool(deviations.gram.isfinite().all()):
        raise_non_finite(inputs, key, tensors)
    return deviations


def raise_non_finite(inputs: MergeInputs, key: str, tensors: Sequence[Tensor]) -> NoReturn:
    """Raises the error that names the file which makes the sums of a tensor infinite or NaN.

    Raises:
        NonFiniteError: a file holds NaN or infinity there.
        RecipeError: no file does; the average is too large for its type.
    """
    for header, tensor in zip(inputs.read, tensors, strict=True):
        bad = int((~tensor.float().isfinite()).sum())
        if bad:
            raise NonFiniteError(
                f"{header.name} holds NaN or infinity in {bad} of {tensor.numel()} values of {key}",
                hint="use an undamaged copy of the file, or leave it out",
            )
    raise RecipeError(
        f"the average of {key} is too large for {str(inputs.dtype).removeprefix('torch.')}",
        hint="choose dtype bfloat16 or float32",
    )
