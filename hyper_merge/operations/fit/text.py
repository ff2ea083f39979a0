"""Formats a fit as plain text, for the terminal and for the file next to its record."""

from __future__ import annotations

import csv
import io

from hyper_merge.runs.fit_records import FitRecord, PrivateLoraRecord
from hyper_merge.runs.report import PARTS
from hyper_merge.runs.report_text import format_largest_losses
from hyper_merge.runs.run import Run
from hyper_merge.runtime.formatting import format_size
from hyper_merge.runtime.names import one_line


def format_style(record: FitRecord, run: Run) -> str:
    """Returns a fit as a line of the WebUI's styles.csv: name, prompt, negative prompt."""
    name, prompt = record.style(run)
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow([name, prompt, ""])
    return line.getvalue()


def format_fit(record: FitRecord, run: Run) -> str:
    """Returns a fit as lines of plain text."""
    name = one_line(record.row.name)
    lines = [
        f"{name}, fitted onto the run {record.run}: {len(run.report.loras)} shared LoRAs",
        "",
        *(_format_explained(record) if record.differs else [_format_equal(run)]),
        *_format_not_carried(record),
        *map(format_private_lora, record.topups),
        "",
        f"To get {name}, load {run.hyper_model.stem} and put this into the prompt:",
        record.tags(run),
    ]
    return "\n".join(lines) + "\n"


def _format_explained(record: FitRecord) -> list[str]:
    row = record.row
    shares = {"unet": row.explained_unet, "text_encoder": row.explained_text_encoder}
    present = [part for part in PARTS if any(section.which == part for section in record.parts)]
    parts = ", ".join(f"{PARTS[part]} {shares[part]:.2%}" for part in present)
    return [
        f"explained: {row.fidelity:.2%} of its difference in the layers",
        f"in weights: {row.explained:.2%} ({parts})",
        f"relative error: {row.error:.4f}",
        f"what remains, by section: {format_largest_losses(record.parts)}",
    ]


def _format_equal(run: Run) -> str:
    name = run.hyper_model.name
    return f"explained: nothing; in all layers it is {name} itself, and all multipliers are 0"


def _format_not_carried(record: FitRecord) -> list[str]:
    shares = ", ".join(f"{kind} {share:.3%}" for kind, share in record.not_carried.items() if share)
    lines = [f"not carried by LoRAs, as a share of all its differences: {shares or 'nothing'}"]
    if record.recovered:
        gains = ", ".join(f"{gain.kind} {gain.share:.2%}" for gain in record.recovered)
        lines.append(f"  of which the LoRAs' companions explain: {gains}")
    return lines


def format_private_lora(lora: PrivateLoraRecord) -> str:
    """Returns what a fit's private LoRA makes of it, as a line."""
    size = format_size(lora.size)
    return f"with the top-up {lora.name} (rank {lora.rank}, {size}): {lora.fidelity:.2%}"
