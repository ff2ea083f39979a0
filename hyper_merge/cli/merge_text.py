"""The result of a merge as plain text."""

from __future__ import annotations

from hyper_merge.operations.merge.merge import MergeResult
from hyper_merge.runs.report_text import format_report


def format_merge(merged: MergeResult) -> str:
    """Returns a merge's figures, the paths of its files, and how to use them."""
    report, place = merged.report, merged.place
    reused = " (it was there already)" if place.exists else ""
    lines = [format_report(report), f"hyper-model: {place.hyper_model}{reused}"]
    lines += [merged.note] if merged.note else []
    lines += [f"LoRA:        {path}" for path in merged.loras]
    lines += [f"multipliers, manifest and report: {place.folder}", ""]
    row = report.checkpoints[0]
    lines += [
        f"To get {row.name}, load the hyper-model and put this into the prompt:",
        report.tags(row),
    ]
    return "\n".join(lines)
