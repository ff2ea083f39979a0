"""What files are: family, size, type, hash, VAE, problems; from headers and a few small tensors."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
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
from hyper_merge.operations.merge.estimate import estimate_merge
from hyper_merge.operations.merge.preflight import Preflight, run_preflight
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.formatting import format_duration, format_size

_SMALL: Final = 4096  # values of a tensor that a VAE's fingerprint takes in
_SHORT: Final = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


@dataclass(frozen=True)
class InspectedFile:
    """One file, as a table shows it."""

    name: str
    path: Path
    family: str | None  # for people; None where it cannot be told
    size: int  # bytes; 0 where there is no file
    dtype: str  # "fp16", or "mixed: fp16, fp32", most values first; empty for an unreadable file
    legacy_hash: str  # A1111's 8 digits; empty for an unreadable file
    vae: str | None  # fingerprint, alike in fp16 and fp32 copies; None where there is no VAE
    problem: str | None = None  # why it cannot be merged, in words


def inspect_files(path: Path) -> InspectedFile:
    """What a file is; one that cannot be merged is no error, its row says why."""
    row = InspectedFile(path.name, path, None, checkpoint_size(path), "", "", None)
    try:
        header = read_header(path)
        row = replace(row, dtype=_dtype(header), legacy_hash=legacy_hash(path))
        row = replace(row, family=with_prediction_type(header, detect_family(header)).title)
        layout = layout_of(header, require_supported(header))
        return replace(row, dtype=_dtype(header, layout), vae=_vae(header, layout))
    except CheckpointError as error:
        return replace(row, problem=str(error))


def format_vaes(rows: Sequence[InspectedFile]) -> str:
    """Whether files have the same VAE, in a sentence."""
    names: dict[str | None, list[str]] = {}
    for row in rows:
        names.setdefault(row.vae, []).append(row.name)
    if len(names) == 1:
        return "VAE: the same in all files" if rows[0].vae else "VAE: in none of the files"
    groups = " / ".join(", ".join(group) for group in names.values())
    return f"VAE: not the same in all files: {groups}"


def format_inspection(paths: Sequence[Path]) -> str:
    """A line per file, and for two or more that go together what a merge of them would take.

    Raises:
        HyperMergeError: a single file, or the set of files, that cannot be merged.
    """
    rows = [inspect_files(path) for path in paths]
    for row in rows:
        if row.problem:
            raise CheckpointError(row.problem)
    width = max(len(row.name) for row in rows)
    lines = [f"{'file':{width}}  {'family':22} {'size':>9}  {'hash':8}  {'VAE':8}  type"]
    lines += [
        f"{row.name:{width}}  {row.family or '':22} {format_size(row.size):>9}"
        f"  {row.legacy_hash:8}  {(row.vae or 'none')[:8]:8}  {row.dtype}"
        for row in rows
    ]
    lines += ["", _layers(paths[0])]
    if len(rows) > 1:
        lines += [
            format_vaes(rows),
            *_together(run_preflight(Recipe(name="inspect", models=tuple(paths)))),
        ]
    return "\n".join(lines)


def checkpoint_size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return 0


def _dtype(header: Header, layout: Layout | None = None) -> str:
    """Types of all numbers, or of those that a merge averages."""
    counts: Counter[str] = Counter()
    for key, info in header.tensors.items():
        kept = layout and layout.treatments[key] in (Treatment.COPY, Treatment.DROP)
        if info.dtype.is_floating_point and not kept:
            words = str(info.dtype).removeprefix("torch.")
            counts[_SHORT.get(info.dtype, words)] += info.numel
    found = [word for word, _ in counts.most_common()]
    return found[0] if len(found) == 1 else f"mixed: {', '.join(found)}" if found else ""


def _vae(header: Header, layout: Layout) -> str | None:
    """Hash of the VAE's small tensors, which every training changes, rounded to float16."""
    keys = [key for key, how in layout.treatments.items() if how is Treatment.VAE]
    small = sorted(key for key in keys if header.tensors[key].numel <= _SMALL)
    if not small:
        return None
    digest = hashlib.sha256()
    with CheckpointReader(header.path, expected=header) as file:
        for key in small:
            digest.update(key.encode())
            digest.update(file.tensor(key).half().flatten().numpy().tobytes())
    return digest.hexdigest()


def _layers(path: Path) -> str:
    header = read_header(path)
    layers = layout_of(header, require_supported(header)).layers
    unet = sum(layer.part == "unet" for layer in layers)
    return f"{len(layers)} layers: {unet} in the UNet, {len(layers) - unet} in the text encoder"


def _together(preflight: Preflight) -> list[str]:
    estimate = estimate_merge(preflight)
    recipe = preflight.recipe
    sizes = {
        "hyper-model": estimate.average,
        "LoRAs": estimate.loras,
        "analysis on disk": estimate.analysis,
        "memory, about": estimate.memory,
    }
    return [
        *(f"note: {warning}" for warning in preflight.warnings),
        f"together, with ranks {', '.join(map(str, recipe.ranks))} in {recipe.dtype}:",
        *(f"  {name:16} {format_size(size):>9}" for name, size in sizes.items()),
        f"  {'time':16} {format_duration(estimate.seconds)}",
    ]
