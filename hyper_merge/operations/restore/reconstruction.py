"""The pass that adds LoRAs to a hyper-model, tensor by tensor; the original is compared on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.analysis.streaming_pass import PassOptions, pass_costs
from hyper_merge.checkpoints.architectures.layout import Treatment, is_position_ids, position_ids
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.errors import NonFiniteError
from hyper_merge.loras.stack import LoraStack
from hyper_merge.runs.weighted_loras import WeightedLora
from hyper_merge.runtime.parallel import parallel_map
from hyper_merge.runtime.progress import Progress


@dataclass(frozen=True, eq=False)
class ReconstructionErrors:
    """Squared norms of the original's differences from the hyper-model, and from what was written."""

    layers: Mapping[int, tuple[float, float]]
    outside: tuple[float, float]


def write_restored(
    total: tuple[
        MergeInputs, Sequence[WeightedLora]
    ],  # the hyper-model alone, and what is added to it
    added: LoraStack,
    writer: SafetensorsWriter,
    original: Header | None,
    progress: Progress,
) -> ReconstructionErrors:
    """Writes every tensor, a few of them in memory, and compares with the original."""
    inputs, _ = total
    header = inputs.headers[0]
    layers: dict[int, tuple[float, float]] = {}
    outside = torch.zeros(2, dtype=torch.float64)
    costs = pass_costs(inputs, PassOptions(torch.device("cpu")))
    counter = progress.counter("restoring", costs)
    with ExitStack() as stack:
        files = [
            stack.enter_context(CheckpointReader(each.path, expected=each))
            for each in (header, original)
            if each
        ]
        _copy(inputs, files[0], writer)
        each = stack.enter_context(parallel_map(torch.device("cpu"), counter.tell))
        stack.enter_context(counter)
        take = partial(_tensor, total, added, files)
        for key, (tensor, found) in zip(costs, each(take, costs), strict=True):
            writer.write(key, tensor)
            for index, pair in found:
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


def _tensor(
    what: tuple[MergeInputs, Sequence[WeightedLora]],
    added: LoraStack,
    files: Sequence[CheckpointReader],
    key: str,
) -> tuple[Tensor, list[tuple[int | None, tuple[float, float]]]]:
    """One tensor in the file's type, and for each piece the two squared norms of `ReconstructionErrors`."""
    inputs, terms = what
    base = files[0].tensor(key)
    total = base.float().clone()
    for rows, index in inputs.pieces(key):
        if index is None:
            _add_vectors(total, added.vectors(key), terms)
        else:
            layer = inputs.layout.layers[index]
            matrix = total[rows].view(layer.m, layer.n)
            pairs = zip(added.factors(layer), terms, strict=True)
            for (up, down), term in pairs:
                matrix.addmm_((up * term.times(layer.part)).float(), down.float())
    stored = total.to(inputs.dtype)
    if not bool(stored.isfinite().all()):
        raise NonFiniteError(
            f"{key} of the restored checkpoint is too large for"
            f" {str(inputs.dtype).removeprefix('torch.')}",
            hint="choose dtype bfloat16 or float32",
        )
    if len(files) == 1:
        return stored, []
    wanted = files[1].tensor(key).float()
    return stored, [
        (index, (_distance(wanted[rows], base[rows]), _distance(wanted[rows], stored[rows])))
        for rows, index in inputs.pieces(key)
    ]


def _add_vectors(
    total: Tensor, vectors: Sequence[Tensor | None], terms: Sequence[WeightedLora]
) -> None:
    for vector, term in zip(vectors, terms, strict=True):
        if vector is not None:
            total += term.multiplier * vector.view(total.shape)


def _distance(one: Tensor, other: Tensor) -> float:
    """Squared norm of the difference."""
    difference = one - other.float()
    return float(torch.linalg.vector_norm(difference, dtype=torch.float64).square())
