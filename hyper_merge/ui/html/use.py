"""What the tab "Use" says, as HTML; names and messages are escaped here and in `views`."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from hyper_merge.loras.prompt_tags import format_tag
from hyper_merge.operations.deletable import DeletionReport, DeletionVerdict
from hyper_merge.operations.export import ExportResult
from hyper_merge.operations.extract.extract import ExtractResult
from hyper_merge.operations.restore.restore import RestoreResult
from hyper_merge.runs.fit_records import FitRecord, PrivateLoraRecord, load_fits
from hyper_merge.runs.manifest import Run
from hyper_merge.runs.report import PARTS, PartLoss
from hyper_merge.runs.weighted_loras import checkpoint_names, tag_rows
from hyper_merge.runtime.formatting import format_size
from hyper_merge.ui.html.common import format_hint, format_message, format_percent, format_table
from hyper_merge.ui.html.runs import format_missing_files

LOWEST: Final = -0.5
HIGHEST: Final = 1.5

_WORST: Final = 6  # sections that are named


def format_used_run(run: Run | None) -> str:
    """What a run offers, in a line; what is wrong with it."""
    if run is None:
        return format_message(
            "info",
            "No merge was made here yet. Of these panels only LoRA from two checkpoints works without.",
        )
    fits, problems = load_fits(run)
    own = [row.name for row in run.report.checkpoints]
    text = f"With {run.hyper_model.name} loaded, the LoRAs make {', '.join(own)} of it"
    later = [each.row.name for each in fits if each.row.name not in own]
    text += f", and {', '.join(later)}, fitted later." if later else "."
    return (
        format_hint(text)
        + format_missing_files(run)
        + "".join(format_message("bad", problem) for problem in problems)
    )


def format_sliders(run: Run) -> str:
    """A slider for every checkpoint; the script makes tags of them, from the multipliers beside."""
    names = checkpoint_names(run)
    terms = json.dumps({name: tag_rows(run, name) for name in names})
    rows = "".join(_slider(name) for name in names)
    return (
        f'<div class=hm-mix data-run="{_text(run.name)}" data-terms="{_text(terms)}">{rows}'
        "<p class=hm-hint data-rest>The hyper-model alone.</p></div>"
    )


def format_fit_result(found: FitRecord, run: Run) -> str:
    """How near the run's LoRAs come to a checkpoint that was not merged, and what remains where."""
    row, name = found.row, _text(found.row.name)
    if not found.differs:
        same = f"In all layers {row.name} is {run.hyper_model.name} itself; it needs no LoRA."
        return format_message("info", same) + _not_carried(found.not_carried)
    shares = {"unet": row.explained_unet, "text_encoder": row.explained_text_encoder}
    present = [part for part in PARTS if any(each.which == part for each in found.parts)]
    parts = ", ".join(f"{PARTS[part]} {format_percent(shares[part])}" for part in present)
    topups = "".join(_topped_up(topup) for topup in found.topups)
    return (
        f"<p><b>{name}</b>: the LoRAs of {_text(run.name)} bring back <b>{format_percent(row.explained)}</b> "
        f"of what sets it apart from the hyper-model ({parts}).</p>"
        + _sections(found.parts)
        + _not_carried(found.not_carried)
        + topups
    )


def format_restored_checkpoint(found: RestoreResult) -> str:
    """The written file, and how near it is to its original."""
    said = format_message("good", f"Written: {_file(found.path, found.size)}, {found.dtype}.")
    rest = 1 - sum(found.shares.values())
    if abs(rest) > 1e-9:
        said += format_hint(
            f"The shares add up to {1 - rest:.4g}; the hyper-model has the rest, {rest:.4g}."
        )
    if found.compared is None:
        said += format_message("info", f"How near it is cannot be measured: {found.problem}.")
    else:
        said += (
            f"<p>Measured against the original: <b>{format_percent(found.compared.explained)}</b> of what sets"
            f" it apart is back in the layers (the report says {format_percent(found.compared.reported)}), "
            f"{format_percent(found.compared.everything)} in everything.</p>"
        ) + _sections(found.compared.parts)
    return said + format_hint(
        f"VAE, embeddings and all else that LoRAs do not carry are those of {found.hyper_model}."
    )


def format_exported_loras(found: Sequence[ExportResult], rank: int | None) -> str:
    """The files, one for every checkpoint."""
    rows = [
        (
            _text(each.checkpoint),
            f"<code>{_text(format_tag(each.path.stem, 1.0) + ' ' * bool(each.companions) + each.companions)}</code>",
            str(each.rank),
            format_size(each.size),
            format_percent(each.explained),
            _small(each.lost),
        )
        for each in found
    ]
    head = ("Checkpoint", "Prompt tags", "Rank", "Size", "Explained", "Lost")
    lost, first = "cutting ranks" if rank else "rounding", found[0]
    return (
        format_message("good", f"{_count(len(found), 'LoRA')} written into {first.path.parent}.")
        + format_table(head, rows, numeric=(2, 3, 4, 5))
        + format_hint(
            f"Load {first.hyper_model.stem} and put one of these into the prompt, alone. Explained: by"
            f" the run's LoRAs. Lost: of that, by {lost}."
        )
    )


def format_deletion_verdicts(found: DeletionReport) -> str:
    """Yes or no for every original."""
    said = (
        format_message("bad", f"Nothing is safe to delete: {found.problem}")
        if found.problem
        else ""
    )
    head: tuple[str, ...] = ("Original", "Delete?", "Frees", "Layers", "Everything", "VAE", "")
    rows = [_verdict(each) for each in found.verdicts]
    if not any(row[-1] for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    return (
        said
        + format_table(head, rows, numeric=(2, 3, 4))
        + format_hint(
            f"Yes: at least {100 * found.threshold:.4g} % of everything that sets it apart from the"
            f" hyper-model comes back. Deleting all of these would free {format_size(found.frees)}."
            " Nothing was deleted; that is up to you."
        )
    )


def format_extracted_lora(found: ExtractResult) -> str:
    """The LoRA that turns one checkpoint into another."""
    parts = ", ".join(
        f"{PARTS[part]} {format_percent(share)}" for part, share in found.parts.items()
    )
    return (
        format_message("good", f"Written: {_file(found.path, found.size)}, rank {found.rank}.")
        + f"<p>It brings back <b>{format_percent(found.explained)}</b> of what sets "
        f"<b>{_text(found.checkpoint)}</b> apart from {_text(found.base)} ({parts}). Load "
        f"{_text(found.base)} and put this into the prompt:</p>"
        f"<p><code>{_text(format_tag(found.path.stem, 1.0))}</code></p>"
        + _not_carried(found.not_carried)
    )


def _slider(name: str) -> str:
    text = _text(name)
    return (
        f"<label class=hm-slider><span>{text}</span>"
        f'<input type=range min={LOWEST} max={HIGHEST} step=any value=0 data-name="{text}" '
        f'aria-label="{text}"><output>0.00</output></label>'
    )


def _sections(parts: Sequence[PartLoss]) -> str:
    worst = [each for each in sorted(parts, key=lambda part: -part.lost) if each.lost > 0][:_WORST]
    if not worst:
        return format_hint("Nothing remains in the layers.")
    rows = [
        (_text(each.name), format_percent(each.energy), format_percent(each.lost)) for each in worst
    ]
    return format_table(
        ("What remains most, by section", "Differs", "Remains"), rows, numeric=(1, 2)
    )


def _not_carried(shares: Mapping[str, float]) -> str:
    words = ", ".join(f"{kind} {_small(share)}" for kind, share in shares.items() if share)
    return format_hint(f"Not carried by LoRAs, of all its differences: {words or 'nothing'}.")


def _verdict(each: DeletionVerdict) -> tuple[str, ...]:
    vae = {None: "not known", True: "differs", False: "same"}[each.vae_differs]
    answer = "<b>yes</b>" if each.safe else "no"
    why = each.reason or ("" if each.path.stem == each.restored_as else f"as {each.restored_as}")
    return (
        _text(each.name),
        answer,
        format_size(each.frees),
        format_percent(each.explained),
        format_percent(each.everything),
        vae,
        f"<span class=hm-why>{_text(why)}</span>" if why else "",
    )


def _topped_up(topup: PrivateLoraRecord) -> str:
    return (
        f"<p>With its private LoRA {_text(topup.name)} (rank {topup.rank}, "
        f"{format_size(topup.size)}): <b>{format_percent(topup.explained)}</b>.</p>"
    )


def _small(share: float) -> str:
    """A share that may be next to nothing."""
    return f"{100 * share:.2f} %" if share >= 1e-4 or share <= 0 else "< 0.01 %"


def _file(path: Path, size: int) -> str:
    return f"{path.name} in {path.parent} ({format_size(size)})"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _text(text: str) -> str:
    return html.escape(text)
