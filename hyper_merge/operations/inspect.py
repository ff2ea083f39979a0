"""Determines family, size, type, hash, VAE and problems of files from headers and small tensors."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from hyper_merge.checkpoints.architectures.detection import detect_family, require_supported
from hyper_merge.checkpoints.architectures.layout import Layout, Treatment, layout_of
from hyper_merge.checkpoints.compatibility import compared_shapes
from hyper_merge.checkpoints.io.hashes import legacy_hash
from hyper_merge.checkpoints.io.header import Header, TensorsAsKey
from hyper_merge.checkpoints.prediction_type import with_prediction_type
from hyper_merge.checkpoints.reader import CheckpointReader, read_header
from hyper_merge.errors import CheckpointError
from hyper_merge.runs.folders import AVERAGE_ID

_SMALL: Final = 4096  # values of a tensor that a VAE's fingerprint takes in
_SHORT: Final = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


@dataclass(frozen=True)
class InspectedFile:
    """The facts about one file, as a table shows them."""

    name: str
    path: Path
    family: str | None  # its title, "SD 1.x"; None where it is unknown
    size: int  # bytes; 0 where there is no file
    dtype: str  # "fp16", or "mixed: fp16, fp32", most values first; empty for an unreadable file
    legacy_hash: str  # A1111's 8 digits; empty for an unreadable file
    vae: str | None  # fingerprint, alike in fp16 and fp32 copies; None where there is no VAE
    problem: str | None = None  # why it cannot be merged; None where it can
    kind: str = ""  # equal for files that can be merged with each other; empty where none can
    is_hyper_model: bool = False  # whether an earlier merge made it


def inspect_files(path: Path) -> InspectedFile:
    """Returns the facts about a file; if it cannot be merged, its `problem` says why."""
    row = inspect_header(path)
    try:
        row = replace(row, legacy_hash=legacy_hash(path) if row.dtype else "")
        return replace(row, vae=vae_fingerprint(path) if row.problem is None else None)
    except CheckpointError as error:
        return replace(row, problem=str(error))


def inspect_header(path: Path) -> InspectedFile:
    """Returns the facts that the header alone tells, which takes milliseconds: no hash, no VAE."""
    row = InspectedFile(path.name, path, None, checkpoint_size(path), "", "", None)
    try:
        header = read_header(path)
        row = replace(
            row,
            dtype=_stored_dtype(TensorsAsKey(header)),
            is_hyper_model=AVERAGE_ID in header.metadata,
        )
        family = with_prediction_type(header, detect_family(header))
        row = replace(row, family=family.title)
        dtype, shapes = _merged_types_and_shapes(TensorsAsKey(header))
        return replace(row, dtype=dtype, kind=f"{family.title} {shapes}")
    except CheckpointError as error:
        return replace(row, problem=str(error))


def vae_fingerprint(path: Path) -> str | None:
    """Returns a hash by which VAEs are told apart; None where the file has no VAE.

    Raises:
        CheckpointError: the file cannot be read or merged.
    """
    header = read_header(path)
    return _vae(header, layout_of(header, require_supported(header)))


def checkpoint_size(path: Path) -> int:
    """Returns the bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return 0


@functools.lru_cache(maxsize=32)
def _stored_dtype(key: TensorsAsKey) -> str:
    return _dtype(key.header)


def _dtype(header: Header, layout: Layout | None = None) -> str:
    """Returns the types of all numbers, or of those that a merge averages."""
    counts: Counter[str] = Counter()
    for key, info in header.tensors.items():
        kept = layout and layout.treatments[key] in (Treatment.COPY, Treatment.DROP)
        if info.dtype.is_floating_point and not kept:
            name = str(info.dtype).removeprefix("torch.")
            counts[_SHORT.get(info.dtype, name)] += info.numel
    names = [name for name, _ in counts.most_common()]
    return names[0] if len(names) == 1 else f"mixed: {', '.join(names)}" if names else ""


@functools.lru_cache(maxsize=32)
def _merged_types_and_shapes(key: TensorsAsKey) -> tuple[str, str]:
    """Returns the types of what a merge averages, and a digest of the shapes in which files must agree."""
    layout = layout_of(key.header, require_supported(key.header))
    shapes = sorted(compared_shapes(key.header, layout).items())
    return _dtype(key.header, layout), hashlib.sha256(repr(shapes).encode()).hexdigest()


def _vae(header: Header, layout: Layout) -> str | None:
    """Returns a hash of the VAE's small tensors, which every training changes, as float16."""
    keys = [key for key, treatment in layout.treatments.items() if treatment is Treatment.VAE]
    small = sorted(key for key in keys if header.tensors[key].numel <= _SMALL)
    if not small:
        return None
    digest = hashlib.sha256()
    with CheckpointReader(header.path, expected=header, mapped=False) as file:
        for key in small:
            digest.update(key.encode())
            digest.update(file.tensor(key).half().flatten().numpy().tobytes())
    return digest.hexdigest()
