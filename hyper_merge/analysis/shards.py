"""Holds what a worker found in a few tensors: what is large in a file on shared storage, the rest at hand.

A shard has every number as the files of the merge will have it: making these from shards changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hyper_merge.analysis.checksums import checksum
from hyper_merge.analysis.damaged_tensors import Damage
from hyper_merge.analysis.layer_analysis import KeptDirections, LayerAnalysis
from hyper_merge.analysis.streaming_pass import AnalyzedTensor, TensorAnalysis
from hyper_merge.analysis.writer import layer_tensors
from hyper_merge.checkpoints.io.header import TensorInfo
from hyper_merge.checkpoints.io.mapped_tensors import ReadTensors
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter
from hyper_merge.decomposition.compression import CompressedLayer
from hyper_merge.errors import CheckpointError, ClusterError


@dataclass(frozen=True, eq=False)
class LayerSums:
    """What is small of a layer's analysis."""

    index: int
    gram: Tensor  # (d + 1, d + 1), float64
    weight: float
    keeps_few: bool  # of the directions among the slices


@dataclass(frozen=True, eq=False)
class TensorSums:
    """What is small of a tensor's analysis."""

    key: str
    energies: Tensor  # (k,)
    layers: tuple[LayerSums, ...]
    damages: tuple[Damage, ...]
    warning: str | None


@dataclass(frozen=True, eq=False)
class Shard:
    """What a worker found in some tensors."""

    path: Path  # of the file with averages, bases and cores
    tensors: tuple[TensorSums, ...]
    checksums: Mapping[str, int]  # by key of the file


class ShardWriter:
    """Writes a shard tensor by tensor."""

    def __init__(self, writer: SafetensorsWriter, declared: Mapping[str, TensorInfo]) -> None:
        """Takes an open writer, and the tensors that it was declared with.

        Args:
            writer: of the file.
            declared: layers by the keys of an analysis, averages by `average_key` if they are wanted.
        """
        self._writer = writer
        self._declared = declared
        self._tensors: list[TensorSums] = []
        self._checksums: dict[str, int] = {}

    def add(self, key: str, tensor: TensorAnalysis, damages: tuple[Damage, ...]) -> None:
        """Writes what is large of a tensor's analysis, and remembers the rest."""
        if average_key(key) in self._declared:
            self._write(average_key(key), tensor.average)
        for layer in tensor.layers:
            for name, part in layer_tensors(layer).items():
                self._write(name, part)
        layers = tuple(
            LayerSums(layer.index, layer.gram, layer.weight, layer.kept is not None)
            for layer in tensor.layers
        )
        self._tensors.append(TensorSums(key, tensor.energies, layers, damages, tensor.warning))

    def finish(self) -> Shard:
        """Closes the file, and returns the shard."""
        self._writer.finish()
        return Shard(self._writer.staged.temporary, tuple(self._tensors), self._checksums)

    def _write(self, key: str, tensor: Tensor) -> None:
        stored = tensor.detach().to("cpu", self._declared[key].dtype)
        self._checksums[key] = checksum(stored)
        self._writer.write(key, stored)


def average_key(key: str) -> str:
    """Returns the key in a shard of a tensor of the average."""
    return f"average {key}"


def read_shard(shard: Shard) -> Iterator[AnalyzedTensor]:
    """Yields the analyses of a shard's tensors, in its order.

    Raises:
        ClusterError: the file is not what the worker wrote.
    """
    try:
        with ReadTensors(shard.path) as file:
            for sums in shard.tensors:
                yield _analyzed(shard, sums, file.get), sums.damages
    except (OSError, KeyError, CheckpointError) as error:
        raise _damaged(shard.path, str(error)) from error


def _analyzed(shard: Shard, sums: TensorSums, get: Callable[[str], Tensor]) -> TensorAnalysis:
    def read(key: str) -> Tensor:
        tensor = get(key)
        if checksum(tensor) != shard.checksums[key]:
            raise _damaged(shard.path, f"its tensor {key} has another checksum")
        return tensor

    name = average_key(sums.key)
    average = read(name) if name in shard.checksums else torch.empty(0)
    layers = tuple(_layer(layer, read) for layer in sums.layers)
    return TensorAnalysis(average, sums.energies, layers, sums.warning)


def _layer(sums: LayerSums, read: Callable[[str], Tensor]) -> LayerAnalysis:
    def part(name: str) -> Tensor:
        return read(f"{sums.index}.{name}")

    return LayerAnalysis(
        index=sums.index,
        gram=sums.gram,
        kept=KeptDirections(part("directions"), part("scales")) if sums.keeps_few else None,
        compressed=CompressedLayer(part("left"), part("right"), part("core")),
        rounding=part("rounding"),
        weight=sums.weight,
    )


def _damaged(path: Path, reason: str) -> ClusterError:
    return ClusterError(
        f"{path} is not what a worker has written ({reason})",
        hint="nothing was changed; run again, and where this is said again check the shared storage",
        file=path,
    )
