"""Checks that the tensors of an analysis are read as they were written."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from hyper_merge.checkpoints.io.safetensors_writer import tensor_bytes
from hyper_merge.errors import DamagedCacheError

CHECKSUMS: Final = "checksums"
"""Key of the tensor that holds the checksums of all others, in the order of their keys; int64."""

_BASES: Final = (".left", ".right")
_NEAR_ONE: Final = 0.05  # for the squared norm of a basis vector in half precision


def checksum(tensor: Tensor) -> int:
    """Returns the CRC-32 of a tensor's bytes, at several GB/s: cheap enough for every reading."""
    return zlib.crc32(tensor_bytes(tensor, tensor.dtype))


def stem_of(identity: Mapping[str, object]) -> str:
    """Returns the first part of the names of all analyses of one identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def is_named_after(name: str, about: str) -> bool:
    """Returns whether the name of an analysis file belongs to the identity in its metadata.

    Args:
        name: name of the file.
        about: JSON text of its identity and width.
    """
    try:
        description = json.loads(about)
        identity = {key: value for key, value in description.items() if key != "width"}
    except (ValueError, AttributeError, RecursionError):
        return False
    return stem_of(identity) == name.partition("-")[0]


class Integrity:
    """Compares each tensor of an open analysis with its checksum when it is first read."""

    def __init__(self, path: Path, keys: Iterable[str], checksums: Tensor | None) -> None:
        """Reads nothing yet.

        Args:
            path: path of the analysis, for messages.
            keys: keys of all its tensors but the checksums.
            checksums: checksums in the order of the keys; None for a file of an earlier version.
        """
        self._path = path
        self._passed: set[str] = set()
        self._expected = (
            None if checksums is None else dict(zip(sorted(keys), checksums.tolist(), strict=True))
        )

    def require(self, key: str, tensor: Tensor) -> None:
        """Returns if a tensor is as it was written under its key; in any thread.

        Raises:
            DamagedCacheError: it is not, or visibly is not where there is no checksum.
        """
        if key in self._passed:
            return
        if self._expected is None:
            fault = _fault(key, tensor)
        else:
            same = checksum(tensor) == self._expected[key]
            fault = None if same else "does not have the checksum that it was written with"
        if fault:
            raise DamagedCacheError(self._path, f"its tensor {key} {fault}")
        self._passed.add(key)


def _fault(key: str, tensor: Tensor) -> str | None:
    """Returns the visible damage of a tensor without a checksum; None if there is none."""
    if not bool(tensor.isfinite().all()):
        return "holds NaN or infinity"
    if key.endswith(_BASES):
        squares = torch.linalg.vector_norm(tensor.float(), dim=0).square()
        if bool(((squares - 1).abs() > _NEAR_ONE).any()):
            return "is no basis: its columns do not have norm 1"
    return None
