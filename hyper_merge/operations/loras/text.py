"""Formats what was made of LoRAs as plain text."""

from __future__ import annotations

from hyper_merge.operations.loras.share import ShareResult
from hyper_merge.runs.report_text import format_report


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
