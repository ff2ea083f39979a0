"""Formats the result of an export as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from hyper_merge.loras.prompt_tags import format_tag
from hyper_merge.operations.export import ExportResult
from hyper_merge.runtime.formatting import format_size


def format_export(results: Sequence[ExportResult], rank: int | None) -> str:
    """Returns a table of the LoRAs, and how to use the first.

    Args:
        results: one for each checkpoint, at least one.
        rank: that the layers were cut down to; None if they were not.
    """
    width = max(len(result.path.stem) for result in results)
    heading = "lost by cutting" if rank else "lost by rounding"
    lines = [f"{'LoRA':{width}}  rank       size  explained before  {heading}"]
    lines += [
        f"{result.path.stem:{width}}  {result.rank:4} {format_size(result.size):>10}"
        f"  {result.explained:16.2%}  {result.lost:{len(heading)}.4%}"
        for result in results
    ]
    first = results[0]
    companions = f" {first.companions}" if first.companions else ""
    lines += [
        f"in {first.path.parent}",
        "",
        f"To get {first.checkpoint}, load {first.hyper_model.stem} and put this into the prompt:",
        format_tag(first.path.stem, 1.0) + companions,
    ]
    return "\n".join(lines)
