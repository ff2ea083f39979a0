"""Keeps the sensitivities of an average in the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from hyper_merge.analysis.checksums import CHECKSUMS, Integrity, checksum
from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.io.header import TensorInfo
from hyper_merge.checkpoints.io.leftovers import claimed
from hyper_merge.checkpoints.io.output_errors import as_output_error
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter
from hyper_merge.checkpoints.reader import CheckpointReader, read_header
from hyper_merge.decomposition.sensitivity import DIRECTIONS, STORED, Sensitivity
from hyper_merge.decomposition.stretch import Stretch
from hyper_merge.errors import CheckpointError, DamagedCacheError, OutputError
from hyper_merge.runtime.damaged_files import DamagedFiles

SENSITIVITIES: Final = ".sensitivities.safetensors"  # suffix of the file with those of an average

Sensitivities = Mapping[str, Sensitivity]
"""By the layers' modules."""

_MOST: Final = 1e30  # of numbers that are multiplied with each other
_VERSION: Final = 2  # of the numbers: another network, or other inputs, has another


def sensitivities_path(cache: Path, average_id: str, seed: int) -> Path:
    """Returns the path of the sensitivities of an average, measured with inputs of a seed."""
    return cache / f"{average_id[:32]}-{seed}-{_VERSION}{SENSITIVITIES}"


def sensitivities_bytes(layers: tuple[Layer, ...]) -> int:
    """Returns about how many bytes the sensitivities of layers take in the cache."""
    return sum(layer.m + layer.n for layer in layers) * DIRECTIONS * STORED.itemsize


def has_sensitivities(path: Path, layers: tuple[Layer, ...]) -> bool:
    """Tells whether a file has the sensitivities of layers, by its header."""
    try:
        keys = read_header(path).tensors.keys()
    except CheckpointError:
        return False
    return all(f"{layer.module}.levels" in keys for layer in layers)


def read_sensitivities(
    path: Path, layers: tuple[Layer, ...], damaged: DamagedFiles | None = None
) -> Sensitivities | None:
    """Returns the sensitivities of layers; None where the file is missing, damaged or of others.

    Args:
        path: path of the file.
        layers: the layers.
        damaged: takes a damaged file; None to leave it where it is.
    """
    if not path.is_file():
        return None
    try:
        with CheckpointReader(path, replaced_whole=True) as file:
            return _read(file, layers)
    except (CheckpointError, DamagedCacheError) as error:
        if damaged is not None and path.exists():
            damaged.take(path, str(error))
        return None


def write_sensitivities(
    path: Path, sensitivities: Sensitivities, warn: Callable[[str], None]
) -> None:
    """Replaces the file; where that fails it only warns: they can be measured again.

    Args:
        path: path of the file.
        sensitivities: by module.
        warn: called with a message if the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for module, sensitivity in sensitivities.items():
        for name, side in (("left", sensitivity.left), ("right", sensitivity.right)):
            tensors[f"{module}.{name}"] = side.directions
            tensors[f"{module}.{name}.factors"] = side.factors
        tensors[f"{module}.levels"] = torch.tensor(
            [sensitivity.mean, sensitivity.rest], dtype=torch.float64
        )
    sums = [checksum(tensors[key]) for key in sorted(tensors)]
    tensors[CHECKSUMS] = torch.tensor(sums, dtype=torch.int64)
    declared = {key: TensorInfo(t.dtype, tuple(t.shape)) for key, t in tensors.items()}
    try:
        with as_output_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with (
            claimed(path.parent) as owner,
            SafetensorsWriter(path, declared, {}, owner=owner) as writer,
        ):
            for key, tensor in tensors.items():
                writer.write(key, tensor)
    except OutputError as error:
        warn(f"the sensitivities of the layers are not remembered: {error}")


def _read(file: CheckpointReader, layers: tuple[Layer, ...]) -> Sensitivities | None:
    """Returns the sensitivities of an open file; None if it lacks a layer.

    Raises:
        DamagedCacheError: it is not as it was written.
    """
    keys = file.header.tensors.keys()
    sums = file.header.tensors.get(CHECKSUMS)
    if sums is None or sums.shape != (len(keys) - 1,):
        raise DamagedCacheError(file.path, f"its tensor {CHECKSUMS} is missing or another")
    if not all(f"{layer.module}.levels" in keys for layer in layers):
        return None
    contents = _Contents(file, Integrity(file.path, keys - {CHECKSUMS}, file.tensor(CHECKSUMS)))
    return {
        layer.module: Sensitivity(
            *contents.levels(f"{layer.module}.levels"),
            contents.side(f"{layer.module}.left", layer.m),
            contents.side(f"{layer.module}.right", layer.n),
        )
        for layer in layers
    }


@dataclass(frozen=True, eq=False)
class _Contents:
    """The tensors of an open file, checked; all methods raise `DamagedCacheError`."""

    file: CheckpointReader
    integrity: Integrity

    def levels(self, key: str) -> tuple[float, float]:
        """Returns the mean and the rest of a layer."""
        mean, rest = self._tensor(key, torch.float64, (2,)).tolist()
        self._require(key, 0 <= mean <= _MOST and 0 < rest <= 1)
        return mean, rest

    def side(self, key: str, size: int) -> Stretch:
        """Returns the stretch of one side of a layer."""
        info = self.file.header.tensors.get(f"{key}.factors")
        count = info.shape[0] if info and info.shape else 0
        factors = self._tensor(f"{key}.factors", torch.float32, (count,))
        self._require(f"{key}.factors", bool(((factors >= 1) & (factors <= _MOST)).all()))
        return Stretch(self._tensor(key, STORED, (size, count)), factors)

    def _tensor(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if self.file.header.tensors.get(key) != TensorInfo(dtype, shape):
            raise DamagedCacheError(self.file.path, f"its tensor {key} is missing or another")
        tensor = self.file.tensor(key)
        self.integrity.require(key, tensor)
        self._require(key, bool(tensor.isfinite().all()))
        return tensor.clone()  # for the file is closed

    def _require(self, key: str, is_sound: bool) -> None:
        if not is_sound:
            raise DamagedCacheError(self.file.path, f"its tensor {key} holds impossible numbers")
