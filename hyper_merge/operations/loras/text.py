"""Formats what was made of LoRAs as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from hyper_merge.operations.loras.apply import ApplyResult
from hyper_merge.operations.loras.combine import CombineResult
from hyper_merge.operations.loras.share import ShareResult
from hyper_merge.runs.report import PARTS
from hyper_merge.runs.report_text import format_report
from hyper_merge.runtime.formatting import format_size
from hyper_merge.runtime.names import one_line


def format_share(result: ShareResult) -> str:
    """Returns the report of shared LoRAs, the paths of their files, and how to use them."""
    report = result.report
    row = report.checkpoints[0]
    lines = [
        format_report(report, of_loras=True),
        *(f"LoRA: {path}" for path in result.loras),
        f"multipliers, manifest and report: {result.folder}",
        "",
        f"In place of {row.name} put this into the prompt:",
        report.tags(row),
    ]
    return "\n".join(lines)


def format_combination(result: CombineResult) -> str:
    """Returns what a LoRA was made of, how much of that it holds, and where it is."""
    parts = ", ".join(f"{PARTS[part]} {share:.3%}" for part, share in result.parts.items())
    before, after = format_size(result.size_before), format_size(result.size)
    return (
        f"{result.path.stem}: {_format_terms(result.loras, result.multipliers)}\n"
        f"rank {result.rank} at most, {result.mean_rank:.1f} in the mean of {result.layers} layers;"
        f" {before} -> {after}\n"
        f"kept: {result.kept:.3%} of the squared norm ({parts})\n"
        f"LoRA: {result.path}\n"
    )


def format_application(result: ApplyResult) -> str:
    """Returns what a checkpoint was made of."""
    terms = _format_terms(result.loras, result.multipliers)
    return (
        f"{result.path.stem}: {one_line(result.checkpoint)} and {terms}\n"
        f"changed: {result.layers} layers, by {result.changed:.3%} of their norm\n"
        f"checkpoint: {result.path} ({format_size(result.size)})\n"
    )


def _format_terms(loras: Sequence[str], multipliers: Sequence[float]) -> str:
    pairs = zip(loras, multipliers, strict=True)
    return " + ".join(f"{x:g} * {one_line(name)}" for name, x in pairs).replace("+ -", "- ")
