"""Formats the HTML of the tab "LoRAs": its picker's frame, and what was made; every name is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from hyper_merge.loras.prompt_tags import format_tag
from hyper_merge.operations.loras.apply import ApplyResult
from hyper_merge.operations.loras.combine import CombineResult
from hyper_merge.runs.fit_records import FitRecord, load_fits, prompts_of
from hyper_merge.runs.report import PARTS, CheckpointReport
from hyper_merge.runs.run import Run
from hyper_merge.runtime.formatting import format_count, format_size
from hyper_merge.ui.element_ids import elem_id
from hyper_merge.ui.html.common import (
    format_hint,
    format_message,
    format_percent,
    format_table,
    in_8_bits,
)
from hyper_merge.ui.html.names import format_names
from hyper_merge.ui.html.use import format_private_lora

_ORDERS: Final = {
    "name": "By name",
    "time": "Newest first",
    "size": "Largest first",
    "family": "By family",
}
_DONE: Final = ' <span class="hm-chip hm-good">✓ Done</span>'


def format_lora_picker() -> str:
    """Returns search, order and folder over the list to pick from, beside the table of the picked ones."""
    orders = "".join(f"<option value={key}>{word}</option>" for key, word in _ORDERS.items())
    return (
        "<div class=hm-picker><div class=hm-available><div class=hm-tools>"
        f'<input type=search id={elem_id("lora_search")} placeholder="Search, any words"'
        ' aria-label="Search LoRAs by any words" autocomplete=off spellcheck=false>'
        f'<select id={elem_id("lora_order")} aria-label="Order of the LoRAs">{orders}</select>'
        f'<select id={elem_id("lora_folder")} aria-label="Folder of the LoRAs"></select></div>'
        f'<ul id={elem_id("lora_available")} aria-label="LoRAs to pick from"></ul>'
        f"<p id={elem_id('lora_available_note')} class=hm-hint role=status></p></div>"
        f"<div class=hm-chosen><div id={elem_id('lora_table')}></div>"
        f"<p id={elem_id('lora_picked_note')} class=hm-hint role=status></p></div></div>"
    )


def format_lora_introduction() -> str:
    """Returns the text that is shown until there is a result."""
    return (
        "<div class=hm-intro><h3>What you get</h3>"
        "<p>Many LoRAs of one base become <b>a few shared ones</b>, and every LoRA one line of prompt"
        " tags that comes close to it. Or smaller files, one LoRA of several, or a checkpoint that has"
        " them built in.</p>"
        "<p>Each result says how much of the original it keeps. Existing files are neither deleted nor"
        " changed.</p></div>"
    )


def format_shared_loras(run: Run, *, is_new: bool = False) -> str:
    """Returns what a run of LoRAs made and where, what it explains, and the tags of every LoRA.

    Args:
        run: the run.
        is_new: whether it was made just now, which the card says.
    """
    report = run.report
    made = format_count(len(report.loras), "shared LoRA")
    if report.topups:
        made += f" and {format_count(len(report.topups), 'private one')}"
    saved = report.bytes_before - report.bytes_loras
    figures = (
        (format_size(abs(saved)), "less on disk" if saved >= 0 else "more on disk"),
        (format_percent(report.fidelity_mean), "explained in the mean"),
        (format_percent(report.worst.fidelity), f"at worst: {report.worst.name}"),
    )
    return (
        f"<div class=hm-card><h3>{_text(run.name)}{_DONE if is_new else ''}</h3>"
        f"<p>{len(report.checkpoints)} LoRAs ({format_size(report.bytes_before)}) → {made}"
        f" ({format_size(report.bytes_loras)}{in_8_bits(run.recipe)})</p>"
        + _format_figures(figures)
        + format_hint(
            "Explained: the share of what a LoRA changes that its prompt tags bring back. Put them"
            " into the prompt in place of the LoRA."
        )
        + _format_place("LoRAs", run.loras[0].parent)
        + _format_place("Report", run.folder)
        + "</div>"
        + _format_missing(run)
        + _format_shares(report.checkpoints)
        + _format_tags(prompts_of(run))
    )


def format_combined_loras(results: Sequence[CombineResult]) -> str:
    """Returns LoRAs that were resized or combined: what they keep, how large they are, and their tags."""
    before, after = (sum(getattr(x, key) for x in results) for key in ("size_before", "size"))
    figures = (
        (format_size(after), f"in place of {format_size(before)}"),
        (
            format_percent(min(x.kept for x in results)),
            "kept" if len(results) == 1 else "kept at worst",
        ),
    )
    title = results[0].path.stem if len(results) == 1 else f"{len(results)} LoRAs"
    head = ("LoRA", "Rank", "Size", "Before", "Kept", *_part_heads(results))
    rows = [
        (
            name,
            str(x.rank),
            format_size(x.size),
            format_size(x.size_before),
            format_percent(x.kept),
            *(_share(x.parts, part) for part in _parts(results)),
        )
        for name, x in zip(format_names([x.path.name for x in results]), results, strict=True)
    ]
    tags = {x.path.stem: format_tag(x.path.stem, 1.0) for x in results}
    return (
        f"<div class=hm-card><h3>{_text(title)}{_DONE}</h3><p>{_text(_terms(results))}</p>"
        + _format_figures(figures)
        + format_hint("Kept: the share of what the LoRA changes that the file holds.")
        + _format_place("Folder", results[0].path.parent)
        + "</div>"
        + format_table(head, rows, numeric=range(1, len(head)))
        + _format_tags(tags)
    )


def format_lora_checkpoint(result: ApplyResult) -> str:
    """Returns a checkpoint to which LoRAs were added, or from which they were taken away."""
    terms = _sum_text(result.loras, result.multipliers)
    figures = (
        (format_size(result.size), "on disk"),
        (str(result.layers), "layers changed"),
        (f"{100 * result.changed:.2g} %", "change of their weights"),
    )
    return (
        f"<div class=hm-card><h3>{_text(result.path.stem)}{_DONE}</h3>"
        f"<p>{_text(result.checkpoint)} and {_text(terms)}</p>"
        + _format_figures(figures)
        + _format_place("Checkpoint", result.path.parent, result.path)
        + "</div>"
    )


def format_fitted_lora(record: FitRecord, run: Run) -> str:
    """Returns how much of a LoRA the shared ones of a run explain, and the tags that stand for it."""
    row = record.row
    return (
        f"<div class=hm-card><h3>{_text(row.name)}{_DONE}</h3>"
        f"<p>Fitted onto the {format_count(len(run.report.loras), 'shared LoRA')} of"
        f" {_text(run.name)}.</p>"
        + _format_figures(((format_percent(row.fidelity), "explained"),))
        + "".join(map(format_private_lora, record.topups))
        + format_hint("Put the tags into the prompt in place of the LoRA.")
        + "</div>"
        + _format_tags({row.name: record.tags(run)})
    )


def _format_figures(figures: Sequence[tuple[str, str]]) -> str:
    cells = "".join(
        f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd></div>" for value, label in figures
    )
    return f"<dl class=hm-figures>{cells}</dl>"


def _format_place(label: str, folder: Path, copied: Path | None = None) -> str:
    """Returns a folder with a button that copies its path, or that of a file in it."""
    shown = re.sub(r"([/\\])", r"\1<wbr>", _text(str(folder)))  # broken between folders only
    return (
        f"<div class=hm-place><span>{label}</span><code>{shown}</code>"
        f'<button type=button class=hm-small data-copy="{_text(str(copied or folder))}"'
        f' aria-label="Copy the path of: {label}">Copy path</button></div>'
    )


def _format_missing(run: Run) -> str:
    names = ", ".join(path.name for path in run.missing)
    _, problems = load_fits(run)
    return format_message(
        "bad", f"Missing: {names}. Distil again to recreate them." if names else ""
    ) + "".join(format_message("bad", problem) for problem in problems)


def _format_shares(rows: Sequence[CheckpointReport]) -> str:
    head = ("LoRA", "Explained", "UNet", "Text encoder")
    cells = [
        (
            name,
            format_percent(row.fidelity),
            format_percent(row.explained_unet),
            format_percent(row.explained_text_encoder),
        )
        for name, row in zip(format_names([row.name for row in rows]), rows, strict=True)
    ]
    return format_table(head, cells, numeric=(1, 2, 3))


def _format_tags(prompts: Mapping[str, str]) -> str:
    """Returns the tags of every LoRA, with a button that copies them."""
    rows = "".join(
        f"<div class=hm-place>{name}<code>{_with_breaks(tags)}</code>"
        f'<button type=button class=hm-small data-copy="{_text(tags)}"'
        f' aria-label="Copy the tags of {_text(whole)}">Copy tags</button></div>'
        for name, (whole, tags) in zip(format_names(list(prompts)), prompts.items(), strict=True)
    )
    return f"<h4>Prompt tags</h4>{rows}"


def _with_breaks(tags: str) -> str:
    """Returns tags that are broken between them, and within one only where it is wider than its place."""
    return " ".join(
        f"<span class=hm-tag>{_text(tag)}</span>" for tag in re.split(r"(?<=>) (?=<)", tags)
    )


def _parts(results: Sequence[CombineResult]) -> list[str]:
    return [part for part in PARTS if any(part in x.parts for x in results)]


def _part_heads(results: Sequence[CombineResult]) -> list[str]:
    return [f"{PARTS[part][0].upper()}{PARTS[part][1:]}" for part in _parts(results)]


def _share(parts: Mapping[str, float], part: str) -> str:
    return format_percent(parts[part]) if part in parts else ""


def _terms(results: Sequence[CombineResult]) -> str:
    if len(results) > 1:
        return "Each LoRA was written again as a smaller file."
    return _sum_text(results[0].loras, results[0].multipliers)


def _sum_text(loras: Sequence[str], multipliers: Sequence[float]) -> str:
    """Returns a sum such as "a + b - 0.5 * c"."""
    terms = [
        f"{'-' if x < 0 else '+'} {'' if abs(x) == 1 else f'{abs(x):g} * '}{name}"
        for name, x in zip(loras, multipliers, strict=True)
    ]
    return " ".join(terms).removeprefix("+ ")


def _text(text: str) -> str:
    return html.escape(text)
