"""Determines family, size, type, hash, VAE and problems of files from headers and small tensors."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from hyper_merge.checkpoints.architectures.detection import detect_family, require_supported
from hyper_merge.checkpoints.architectures.layout import Layout, Treatment, layout_of
from hyper_merge.checkpoints.io.hashes import legacy_hash
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.checkpoints.prediction_type import with_prediction_type
from hyper_merge.checkpoints.reader import CheckpointReader, read_header
from hyper_merge.errors import CheckpointError

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


def inspect_files(path: Path) -> InspectedFile:
    """Returns the facts about a file; if it cannot be merged, its `problem` says why."""
    row = InspectedFile(path.name, path, None, checkpoint_size(path), "", "", None)
    try:
        header = read_header(path)
        row = replace(row, dtype=_dtype(header), legacy_hash=legacy_hash(path))
        row = replace(row, family=with_prediction_type(header, detect_family(header)).title)
        layout = layout_of(header, require_supported(header))
        return replace(row, dtype=_dtype(header, layout), vae=_vae(header, layout))
    except CheckpointError as error:
        return replace(row, problem=str(error))


def checkpoint_size(path: Path) -> int:
    """Returns the bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return 0


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


def _vae(header: Header, layout: Layout) -> str | None:
    """Returns a hash of the VAE's small tensors, which every training changes, as float16."""
    keys = [key for key, treatment in layout.treatments.items() if treatment is Treatment.VAE]
    small = sorted(key for key in keys if header.tensors[key].numel <= _SMALL)
    if not small:
        return None
    digest = hashlib.sha256()
    with CheckpointReader(header.path, expected=header) as file:
        for key in small:
            digest.update(key.encode())
            digest.update(file.tensor(key).half().flatten().numpy().tobytes())
    return digest.hexdigest()
