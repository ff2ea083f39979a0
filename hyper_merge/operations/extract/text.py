"""Formats the result of an extraction as plain text."""

from __future__ import annotations

from hyper_merge.loras.prompt_tags import format_tag
from hyper_merge.operations.extract.extract import ExtractResult
from hyper_merge.runs.report import PARTS
from hyper_merge.runtime.formatting import format_size


def format_extraction(result: ExtractResult) -> str:
    """Returns how good the LoRA is, and how to use it."""
    parts = ", ".join(f"{PARTS[part]} {share:.2%}" for part, share in result.parts.items())
    outside = ", ".join(f"{kind} {share:.3%}" for kind, share in result.not_carried.items())
    return (
        f"{result.path.stem}: from {result.base} to {result.checkpoint},"
        f" rank {result.rank} in {result.layers} layers, {format_size(result.size)}\n"
        f"explained: {result.explained:.2%} of all differences in the layers ({parts})\n"
        f"not carried by a LoRA, as a share of all differences: {outside or 'nothing'}\n"
        f"LoRA: {result.path}\n\n"
        f"To get {result.checkpoint}, load {result.base} and put this into the prompt:\n"
        + format_tag(result.path.stem, 1.0)
    )
