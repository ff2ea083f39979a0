"""Formats the HTML of the tab "Use"; every name is escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from hyper_merge.loras.prompt_tags import format_tag
from hyper_merge.operations.deletable import DeletionReport, DeletionVerdict
from hyper_merge.operations.deletable_text import NOTHING_FREED
from hyper_merge.operations.export import ExportResult
from hyper_merge.operations.extract.extract import ExtractResult
from hyper_merge.operations.restore.restore import RestoreResult
from hyper_merge.runs.fit_records import FitRecord, PrivateLoraRecord, load_fits
from hyper_merge.runs.report import PARTS, PartLoss
from hyper_merge.runs.run import Run
from hyper_merge.runs.weighted_loras import checkpoint_names, tag_rows
from hyper_merge.runtime.formatting import format_count, format_size
from hyper_merge.ui.html.common import (
    format_hint,
    format_message,
    format_percent,
    format_table,
)
from hyper_merge.ui.html.names import format_names
from hyper_merge.ui.html.result import format_missing_files

LOWEST: Final = -0.5
HIGHEST: Final = 1.5

_WORST: Final = 6  # sections that are named


def format_used_run(run: Run | None) -> str:
    """Returns a line about a run, with its problems."""
    if run is None:
        return format_message(
            "info",
            "There are no runs yet; make one under Merge. LoRA from two checkpoints works without a run.",
        )
    fits, problems = load_fits(run)
    merged = [row.name for row in run.report.checkpoints]
    text = f"Load {run.hyper_model.name}; the LoRAs turn it into {', '.join(merged)}"
    later = [fit.row.name for fit in fits if fit.row.name not in merged]
    text += f", and {', '.join(later)} (fitted later)." if later else "."
    return (
        format_hint(text)
        + format_missing_files(run)
        + "".join(format_message("bad", problem) for problem in problems)
    )


def format_sliders(run: Run) -> str:
    """Returns a slider per checkpoint, with the multipliers from which the script makes prompt tags."""
    names = checkpoint_names(run)
    terms = json.dumps({name: tag_rows(run, name) for name in names})
    labels = format_names(names)
    # Norms and biases are scaled by block in no WebUI, and get lost in Forge.
    whole = " data-whole" if run.report.companions else ""
    rows = "".join(_format_slider(*pair) for pair in zip(names, labels, strict=True))
    return (
        f'<div class=hm-mix data-run="{_text(run.name)}" data-terms="{_text(terms)}"{whole}>{rows}'
        "<p class=hm-hint data-rest>The hyper-model alone.</p></div>"
    )


def format_fit_result(fit: FitRecord, run: Run) -> str:
    """Returns the share that a run's LoRAs explain of a fitted checkpoint, and where the rest lies."""
    row, name = fit.row, _text(fit.row.name)
    if not fit.differs:
        same = f"{row.name} equals {run.hyper_model.name} in all layers; it needs no LoRA."
        return format_message("info", same) + _format_not_carried(fit.not_carried)
    shares = {"unet": row.explained_unet, "text_encoder": row.explained_text_encoder}
    present = [part for part in PARTS if any(section.which == part for section in fit.parts)]
    parts = ", ".join(f"{PARTS[part]} {format_percent(shares[part])}" for part in present)
    private = "".join(format_private_lora(lora) for lora in fit.topups)
    return (
        f"<p><b>{name}</b>: the LoRAs of {_text(run.name)} explain <b>{format_percent(row.fidelity)}</b> "
        f"of its difference from the hyper-model (in weights: {parts}).</p>"
        + _format_sections(fit.parts)
        + _format_not_carried(fit.not_carried)
        + private
    )


def format_restored_checkpoint(restored: RestoreResult) -> str:
    """Returns the written file, and how close it is to its original."""
    text = format_message(
        "good", f"Written: {_format_file(restored.path, restored.size)}, {restored.dtype}."
    )
    rest = 1 - sum(restored.shares.values())
    if abs(rest) > 1e-9:
        text += format_hint(
            f"The shares add up to {1 - rest:.4g}; the hyper-model has the rest, {rest:.4g}."
        )
    measured = restored.compared
    if measured is None:
        text += format_message("info", f"Not compared with an original: {restored.problem}.")
    else:
        text += (
            f"<p>Compared with the original: <b>{format_percent(measured.explained)}</b> of its"
            f" difference from the hyper-model is restored in the layers, in weights (the report says"
            f" {format_percent(measured.reported)}), {format_percent(measured.everything)} in all"
            " tensors.</p>"
        ) + _format_sections(measured.parts)
    return text + format_hint(
        f"VAE, embeddings and everything else that LoRAs do not carry come from {restored.hyper_model}."
    )


def format_exported_loras(exported: Sequence[ExportResult], rank: int | None) -> str:
    """Returns the table of written LoRAs, one per checkpoint."""
    head = ("Checkpoint", "Prompt tags", "Rank", "Size", "Explained", "Lost")
    lost, first = "cutting ranks" if rank else "rounding", exported[0]
    names = format_names([lora.checkpoint for lora in exported])
    rows = [_export_row(*pair) for pair in zip(names, exported, strict=True)]
    return (
        format_message(
            "good", f"{format_count(len(exported), 'LoRA')} written to {first.path.parent}."
        )
        + format_table(head, rows, numeric=(2, 3, 4, 5))
        + format_hint(
            f"Load {first.hyper_model.stem} and add exactly one of these to the prompt. Explained: by"
            f" the run's LoRAs. Lost: the part of that which {lost} costs."
        )
    )


def _export_row(name: str, lora: ExportResult) -> tuple[str, ...]:
    tags = " ".join(filter(None, (format_tag(lora.path.stem, 1.0), lora.companions)))
    return (
        name,
        f"<code>{_text(tags)}</code>",
        str(lora.rank),
        format_size(lora.size),
        format_percent(lora.explained),
        _format_small_share(lora.lost),
    )


def format_deletion_verdicts(report: DeletionReport) -> str:
    """Returns yes or no for every original."""
    text = ""
    if report.problem:
        text = format_message("bad", f"Nothing is safe to delete: {report.problem}")
    head: tuple[str, ...] = ("Original", "Delete?", "Frees", "Layers", "All tensors", "VAE", "")
    names = format_names([verdict.name for verdict in report.verdicts])
    rows = [_verdict_row(*pair) for pair in zip(names, report.verdicts, strict=True)]
    if not any(row[-1] for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    freed = "There is none here."
    if any(verdict.safe for verdict in report.verdicts):
        size = format_size(report.frees) if report.frees else NOTHING_FREED
        freed = f"Deleting those with yes would free {size}."
    return (
        text
        + format_table(head, rows, numeric=(2, 3, 4))
        + format_hint(
            f"Yes: the run restores at least {100 * report.threshold:.4g} % of the original's"
            f" difference from the hyper-model, in all tensors. {freed} Nothing was deleted; the"
            " decision is yours."
        )
    )


def format_extracted_lora(lora: ExtractResult) -> str:
    """Returns the LoRA that turns one checkpoint into another, and the share that it explains."""
    parts = ", ".join(
        f"{PARTS[part]} {format_percent(share)}" for part, share in lora.parts.items()
    )
    return (
        format_message("good", f"Written: {_format_file(lora.path, lora.size)}, rank {lora.rank}.")
        + f"<p>It explains <b>{format_percent(lora.explained)}</b> of the difference between "
        f"<b>{_text(lora.checkpoint)}</b> and {_text(lora.base)} ({parts}). Load {_text(lora.base)} and "
        "add this to the prompt:</p>"
        f"<p><code>{_text(format_tag(lora.path.stem, 1.0))}</code></p>"
        + _format_not_carried(lora.not_carried)
    )


def _format_slider(name: str, label: str) -> str:
    text = _text(name)
    return (
        f"<label class=hm-slider>{label}"
        f'<input type=range min={LOWEST} max={HIGHEST} step=any value=0 data-name="{text}" '
        f'aria-label="{text}"><output>0.00</output></label>'
    )


def _format_sections(parts: Sequence[PartLoss]) -> str:
    worst = [part for part in sorted(parts, key=lambda part: -part.lost) if part.lost > 0][:_WORST]
    if not worst:
        return format_hint("Nothing is missing in the layers.")
    rows = [
        (_text(part.name), format_percent(part.energy), format_percent(part.lost)) for part in worst
    ]
    return format_table(("Largest losses", "Difference", "Not explained"), rows, numeric=(1, 2))


def _format_not_carried(shares: Mapping[str, float]) -> str:
    text = ", ".join(
        f"{kind} {_format_small_share(share)}" for kind, share in shares.items() if share
    )
    return format_hint(f"Not carried by LoRAs, as a share of all differences: {text or 'nothing'}.")


def _verdict_row(name: str, verdict: DeletionVerdict) -> tuple[str, ...]:
    vae = {None: "unknown", True: "differs", False: "same"}[verdict.vae_differs]
    answer = "<b>yes</b>" if verdict.safe else "no"
    reason = verdict.reason
    if not reason and verdict.path.stem != verdict.restored_as:
        reason = f"as {verdict.restored_as}"
    return (
        name,
        answer,
        format_size(verdict.frees),
        format_percent(verdict.explained),
        format_percent(verdict.everything),
        vae,
        f"<span class=hm-why>{_text(reason)}</span>" if reason else "",
    )


def format_private_lora(topup: PrivateLoraRecord) -> str:
    """Returns what a fit's private LoRA makes of it."""
    return (
        f"<p>With its private LoRA {_text(topup.name)} (rank {topup.rank}, "
        f"{format_size(topup.size)}): <b>{format_percent(topup.fidelity)}</b>.</p>"
    )


def _format_small_share(share: float) -> str:
    """Returns a share in percent, with a lower limit for what is shown."""
    return f"{100 * share:.2f} %" if share >= 1e-4 or share <= 0 else "< 0.01 %"


def _format_file(path: Path, size: int) -> str:
    return f"{path.name} in {path.parent} ({format_size(size)})"


def _text(text: str) -> str:
    return html.escape(text)
