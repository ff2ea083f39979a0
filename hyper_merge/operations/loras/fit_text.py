"""Formats the fit of a LoRA as plain text, for the terminal and for the file next to its record."""

from __future__ import annotations

from hyper_merge.operations.fit.text import format_private_lora
from hyper_merge.runs.fit_records import FitRecord
from hyper_merge.runs.report import PARTS
from hyper_merge.runs.report_text import format_largest_losses
from hyper_merge.runs.run import Run
from hyper_merge.runtime.names import one_line


def format_lora_fit(record: FitRecord, run: Run) -> str:
    """Returns a LoRA's fit as lines of plain text."""
    name, row = one_line(record.row.name), record.row
    shares = {"unet": row.explained_unet, "text_encoder": row.explained_text_encoder}
    present = [part for part in PARTS if any(section.which == part for section in record.parts)]
    parts = ", ".join(f"{PARTS[part]} {shares[part]:.2%}" for part in present)
    lines = [
        f"{name}, fitted onto the run {record.run}: {len(run.report.loras)} shared LoRAs",
        "",
        f"explained: {row.explained:.2%} of what it changes ({parts})",
        f"relative error: {row.error:.4f}",
        f"what remains, by section: {format_largest_losses(record.parts)}",
        *map(format_private_lora, record.topups),
        "",
        f"In place of {name} put this into the prompt:",
        record.tags(run),
    ]
    return "\n".join(lines) + "\n"
