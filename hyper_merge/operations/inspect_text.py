"""Formats the facts about files, and the estimate of their merge, as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hyper_merge.checkpoints.architectures.detection import require_supported
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import CheckpointError
from hyper_merge.operations.inspect import InspectedFile, inspect_files
from hyper_merge.operations.merge.estimate import estimate_merge
from hyper_merge.operations.merge.preflight import Preflight, find_unfinished, run_preflight
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.formatting import format_duration, format_size


def format_vaes(rows: Sequence[InspectedFile]) -> str:
    """Returns a sentence about whether files have the same VAE."""
    names: dict[str | None, list[str]] = {}
    for row in rows:
        names.setdefault(row.vae, []).append(row.name)
    if len(names) == 1:
        return "VAE: the same in all files" if rows[0].vae else "VAE: in none of the files"
    groups = " / ".join(", ".join(group) for group in names.values())
    return f"VAE: not the same in all files: {groups}"


def format_inspection(paths: Sequence[Path]) -> str:
    """Returns a line per file, and for two or more what a merge of them would take.

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
    lines += ["", _format_layers(paths[0])]
    if len(rows) > 1:
        recipe = Recipe(name="inspect", models=tuple(paths), damaged="accept")  # says so instead
        lines += [format_vaes(rows), *_format_merge(run_preflight(recipe))]
    else:
        lines += [f"note: {sign}" for sign in find_unfinished([read_header(paths[0])])]
    return "\n".join(lines)


def _format_layers(path: Path) -> str:
    header = read_header(path)
    layers = layout_of(header, require_supported(header)).layers
    unet = sum(layer.part == "unet" for layer in layers)
    return f"{len(layers)} layers: {unet} in the UNet, {len(layers) - unet} in the text encoder"


def _format_merge(preflight: Preflight) -> list[str]:
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
