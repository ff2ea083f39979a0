"""The pass that adds LoRAs to a hyper-model, tensor by tensor; the original is compared on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hyper_merge.analysis.inputs import Sources
from hyper_merge.analysis.streaming_pass import Work, pass_costs
from hyper_merge.checkpoints.architectures.layout import Treatment, is_position_ids, position_ids
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter
from hyper_merge.checkpoints.reader import Checkpoint
from hyper_merge.errors import NonFiniteError
from hyper_merge.loras.stack import Added
from hyper_merge.runs.weighted_loras import Term
from hyper_merge.runtime.parallel import workers
from hyper_merge.runtime.progress import Control


@dataclass(frozen=True, eq=False)
class Errors:
    """Squared norms of the original's differences from the hyper-model, and from what was written."""

    layers: Mapping[int, tuple[float, float]]
    outside: tuple[float, float]


def write_restored(
    total: tuple[Sources, Sequence[Term]],  # the hyper-model alone, and what is added to it
    added: Added,
    writer: SafetensorsWriter,
    original: Header | None,
    control: Control,
) -> Errors:
    """Writes every tensor, a few of them in memory, and compares with the original."""
    sources, _ = total
    header = sources.headers[0]
    layers: dict[int, tuple[float, float]] = {}
    outside = torch.zeros(2, dtype=torch.float64)
    costs = pass_costs(sources, Work(torch.device("cpu")))
    tally = control.tally("restoring", costs)
    with ExitStack() as stack:
        files = [
            stack.enter_context(Checkpoint(each.path, expected=each))
            for each in (header, original)
            if each
        ]
        _copy(sources, files[0], writer)
        each = stack.enter_context(workers(torch.device("cpu"), tally.tell))
        stack.enter_context(tally)
        take = partial(_tensor, total, added, files)
        for key, (tensor, found) in zip(costs, each(take, costs), strict=True):
            writer.write(key, tensor)
            for index, pair in found:
                if index is None:
                    outside += torch.tensor(pair, dtype=torch.float64)
                else:
                    layers[index] = pair
            tally.finish(key)
    energy, left = outside.tolist()
    return Errors(layers, (energy, left))


def _copy(sources: Sources, file: Checkpoint, writer: SafetensorsWriter) -> None:
    for key, info in sources.outputs().items():
        if sources.layout.treatments[key] is Treatment.COPY:
            writer.write(
                key, position_ids(info.shape) if is_position_ids(key) else file.tensor(key)
            )


def _tensor(
    what: tuple[Sources, Sequence[Term]], added: Added, files: Sequence[Checkpoint], key: str
) -> tuple[Tensor, list[tuple[int | None, tuple[float, float]]]]:
    """One tensor in the file's type, and for each piece the two squared norms of `Errors`."""
    sources, terms = what
    base = files[0].tensor(key)
    total = base.float().clone()
    for rows, index in sources.pieces(key):
        if index is None:
            _add_vectors(total, added.vectors(key), terms)
        else:
            layer = sources.layout.layers[index]
            matrix = total[rows].view(layer.m, layer.n)
            pairs = zip(added.factors(layer), terms, strict=True)
            for (up, down), term in pairs:
                matrix.addmm_((up * term.times(layer.part)).float(), down.float())
    stored = total.to(sources.dtype)
    if not bool(stored.isfinite().all()):
        raise NonFiniteError(
            f"{key} of the restored checkpoint is too large for"
            f" {str(sources.dtype).removeprefix('torch.')}; choose dtype"
            " bfloat16 or float32"
        )
    if len(files) == 1:
        return stored, []
    wanted = files[1].tensor(key).float()
    return stored, [
        (index, (_distance(wanted[rows], base[rows]), _distance(wanted[rows], stored[rows])))
        for rows, index in sources.pieces(key)
    ]


def _add_vectors(total: Tensor, vectors: Sequence[Tensor | None], terms: Sequence[Term]) -> None:
    for vector, term in zip(vectors, terms, strict=True):
        if vector is not None:
            total += term.multiplier * vector.view(total.shape)


def _distance(one: Tensor, other: Tensor) -> float:
    """Squared norm of the difference."""
    difference = one - other.float()
    return float(torch.linalg.vector_norm(difference, dtype=torch.float64).square())
