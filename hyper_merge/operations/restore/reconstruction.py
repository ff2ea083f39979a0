"""Adds LoRAs to a hyper-model tensor by tensor, and compares with the original on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hyper_merge.analysis.inputs import MergeInputs, open_checkpoints
from hyper_merge.analysis.streaming_pass import PassOptions, pass_costs
from hyper_merge.checkpoints.architectures.layout import Treatment, is_position_ids, position_ids
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.decomposition.linalg import add_products
from hyper_merge.errors import NonFiniteError
from hyper_merge.loras.stack import LoraStack
from hyper_merge.runs.weighted_loras import WeightedLora
from hyper_merge.runtime.parallel import parallel_map
from hyper_merge.runtime.progress import Progress


@dataclass(frozen=True, eq=False)
class ReconstructionErrors:
    """Squared norms of the original's differences from the hyper-model, and from what was written."""

    layers: Mapping[int, tuple[float, float]]  # by the layer's index
    outside: tuple[float, float]  # of all other tensors


def write_restored(
    inputs: MergeInputs,
    loras: Sequence[WeightedLora],
    stack: LoraStack,
    writer: SafetensorsWriter,
    original: Header | None,
    progress: Progress,
) -> ReconstructionErrors:
    """Writes every tensor, a few of them in memory, and compares with the original.

    Args:
        inputs: the hyper-model alone.
        loras: the LoRAs that are added to it.
        stack: the files of these LoRAs, open, in the same order.
        writer: of the new file.
        original: the checkpoint that is restored; None to compare with nothing.
        progress: progress and interrupt.

    Raises:
        NonFiniteError: the file's type cannot hold a value.
    """
    header = inputs.headers[0]
    layers: dict[int, tuple[float, float]] = {}
    outside = torch.zeros(2, dtype=torch.float64)
    costs = pass_costs(inputs, PassOptions(torch.device("cpu")))
    counter = progress.counter("restoring", costs)
    with ExitStack() as opened:
        headers = [header, original] if original else [header]
        files = opened.enter_context(open_checkpoints(headers))
        _copy(inputs, files[0], writer)
        parallel = opened.enter_context(parallel_map(torch.device("cpu"), counter.report))
        opened.enter_context(counter)
        take = partial(_restore_tensor, inputs, loras, stack, files)
        for key, (tensor, errors) in zip(costs, parallel(take, costs), strict=True):
            writer.write(key, tensor)
            for index, pair in errors:
                if index is None:
                    outside += torch.tensor(pair, dtype=torch.float64)
                else:
                    layers[index] = pair
            counter.finish(key)
    energy, left = outside.tolist()
    return ReconstructionErrors(layers, (energy, left))


def _copy(inputs: MergeInputs, file: CheckpointReader, writer: SafetensorsWriter) -> None:
    for key, info in inputs.outputs().items():
        if inputs.layout.treatments[key] is Treatment.COPY:
            writer.write(
                key, position_ids(info.shape) if is_position_ids(key) else file.tensor(key)
            )


def _restore_tensor(
    inputs: MergeInputs,
    loras: Sequence[WeightedLora],
    stack: LoraStack,
    files: Sequence[CheckpointReader],
    key: str,
) -> tuple[Tensor, list[tuple[int | None, tuple[float, float]]]]:
    """Returns a tensor in the file's type, and by piece the norms of `ReconstructionErrors`."""
    base = files[0].tensor(key)
    total = base.float().clone()
    for rows, index in inputs.pieces(key):
        if index is None:
            _add_vectors(total, stack.vectors(key), loras)
        else:
            layer = inputs.layout.layers[index]
            matrix = total[rows].view(layer.m, layer.n)
            pairs = zip(stack.factors(layer), loras, strict=True)
            add_products(matrix, [(*pair, lora.times(layer.part)) for pair, lora in pairs])
    stored = total.to(inputs.dtype)
    if not bool(stored.isfinite().all()):
        raise NonFiniteError(
            f"{key} of the restored checkpoint is too large for"
            f" {str(inputs.dtype).removeprefix('torch.')}",
            hint="choose dtype bfloat16 or float32",
        )
    if len(files) == 1:
        return stored, []
    original = files[1].tensor(key).float()
    return stored, [
        (index, (_distance(original[rows], base[rows]), _distance(original[rows], stored[rows])))
        for rows, index in inputs.pieces(key)
    ]


def _add_vectors(
    total: Tensor, vectors: Sequence[Tensor | None], loras: Sequence[WeightedLora]
) -> None:
    for vector, lora in zip(vectors, loras, strict=True):
        if vector is not None:
            total += lora.multiplier * vector.view(total.shape)


def _distance(one: Tensor, other: Tensor) -> float:
    """Returns the squared norm of the difference."""
    difference = one - other.float()
    return float(torch.linalg.vector_norm(difference, dtype=torch.float64).square())
