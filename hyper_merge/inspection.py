"""What files are, in a table: family, size, type, hash, problems; from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hyper_merge.checkpoints.family import require_supported
from hyper_merge.checkpoints.hashes import legacy_hash
from hyper_merge.checkpoints.header import Header
from hyper_merge.checkpoints.layers import layout_of
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.preflight import Preflight, examine
from hyper_merge.recipe import Recipe


def describe(paths: Sequence[Path]) -> str:
    """A line per file, and for two or more that go together what a merge of them would take.

    Raises:
        HyperMergeError: a single file, or the set of files, that cannot be merged.
    """
    headers = [read_header(path) for path in paths]
    width = max(len(header.name) for header in headers)
    lines = [f"{'file':{width}}  {'family':22} {'size':>9}  {'hash':8}  tensors"]
    for header in headers:
        family = require_supported(header)
        lines.append(
            f"{header.name:{width}}  {family.title:22} {header.size / 1e9:6.2f} GB"
            f"  {legacy_hash(header.path):8}  {_tensors(header)}"
        )
    layers = layout_of(headers[0], require_supported(headers[0])).layers
    unet = sum(layer.part == "unet" for layer in layers)
    lines += [
        "",
        f"{len(layers)} layers: {unet} in the UNet, {len(layers) - unet} in the text encoder",
    ]
    if len(headers) > 1:
        lines += _together(examine(Recipe(name="inspect", models=tuple(paths))))
    return "\n".join(lines)


def _tensors(header: Header) -> str:
    counts = Counter(str(info.dtype).removeprefix("torch.") for info in header.tensors.values())
    return ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())


def _together(preflight: Preflight) -> list[str]:
    estimate = preflight.estimate
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
        *(f"  {name:16} {size / 1e9:6.2f} GB" for name, size in sizes.items()),
    ]
