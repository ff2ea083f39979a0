"""What the tab says, as HTML: tables, sentences, progress. Text in, text out; every name is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

from hyper_merge.errors import HyperMergeError
from hyper_merge.hosts.job_queue import BusyError, JobStatus, in_one_line
from hyper_merge.loras.prompt_tags import lora_names
from hyper_merge.operations.inspect import InspectedFile
from hyper_merge.operations.merge.plan import ForecastCurve
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runs.folders import Place
from hyper_merge.runs.report_text import format_groups
from hyper_merge.runtime.formatting import format_duration, format_size

Kind = Literal["info", "good", "bad"]

_ENDINGS: Final[Mapping[str, tuple[Kind, str]]] = {
    "done": ("good", "Done"),
    "stopped": ("info", "Stopped"),
    "refused": ("bad", "Not made"),
    "failed": ("bad", "An unexpected error ended it; the log has all of it"),
}


def format_message(kind: Kind, text: str) -> str:
    """A calm box with one message; empty for no text."""
    return f'<div class="hm-message hm-{kind}" role="status">{_text(text)}</div>' if text else ""


def format_unexpected_error(error: BaseException) -> str:
    """What is said of an error that nobody expected."""
    return format_message(
        "bad", f"An unexpected error; the log has all of it: {in_one_line(error)}"
    )


def format_refusal(error: HyperMergeError) -> str:
    """Why something was not begun; that something else runs is no fault."""
    return format_message("info" if isinstance(error, BusyError) else "bad", str(error))


def format_hint(text: str) -> str:
    """A quiet remark."""
    return f"<p class=hm-hint>{_text(text)}</p>"


def format_percent(share: float) -> str:
    """A share 0..1 for people; never rounded up to a whole that it is not.

    >>> percent(0.7536), percent(0.99996), percent(1.0)
    ('75.4 %', '99.9 %', '100 %')
    """
    if share >= 1:
        return "100 %"
    return f"{min(round(share * 100, 1), 99.9) + 0.0:.1f} %"  # + 0.0: no negative zero


def format_merge_introduction() -> str:
    """What stands where the result will be."""
    return (
        "<div class=hm-intro><h3>What you get</h3>"
        "<p>One <b>hyper-model</b>, the average of the checkpoints, and a few <b>LoRAs</b> that all of "
        "them share. For every checkpoint there is one line for the prompt: with it the hyper-model "
        "becomes nearly that checkpoint.</p>"
        "<p>A report says how near, before you decide which files to keep. Nothing is ever deleted or "
        "replaced by a merge.</p></div>"
    )


def format_table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],  # cells in HTML
    numeric: Iterable[int] = (),  # columns to be aligned at the right
) -> str:
    """A table; its cells are HTML already, its head is text."""
    right = set(numeric)

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=hm-number' if place in right else ''}>{value}</{tag}>"
            for place, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    top = cells("th", [_text(name) for name in head])
    return (
        f'<div class="hm-scroll"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def format_checkpoints(
    rows: Sequence[tuple[str, InspectedFile]], hashes: Mapping[str, str | None]
) -> str:
    """What is known of the chosen checkpoints.

    Args:
        rows: name in the host's list, and what its file is.
        hashes: short SHA-256 by that name, where the host knows it.
    """
    if not rows:
        return format_message(
            "info", "Pick two or more checkpoints; a table here says what they are."
        )
    groups = vae_groups([row for _, row in rows])
    cells = [
        (
            _name_cell(name, row),
            _text(row.family or ""),
            format_size(row.size),
            _text(row.dtype),
            f"<code>{_text(hashes.get(name) or row.legacy_hash)}</code>",
            _text(vae),
        )
        for (name, row), vae in zip(rows, groups, strict=True)
    ]
    head = ("Checkpoint", "Family", "Size", "Precision", "Short hash", "VAE")
    differ = len({row.vae for _, row in rows if row.vae}) > 1
    note = "The VAEs differ; the hyper-model gets the one that is chosen under Advanced."
    return format_table(head, cells, numeric=(2,)) + (format_hint(note) if differ else "")


def vae_groups(rows: Sequence[InspectedFile]) -> list[str]:
    """Of every file: `same` if all have one VAE, else a letter for each different one."""
    prints = [row.vae for row in rows]
    known = list(dict.fromkeys(vae for vae in prints if vae is not None))
    if len(known) == 1:
        return ["none" if vae is None else "same" for vae in prints]
    return ["none" if vae is None else _letter(known.index(vae)) for vae in prints]


def format_merge_plan(preflight: Preflight, place: Place, asked: int | None = None) -> str:
    """What a merge will write and take.

    Args:
        preflight: the examined recipe.
        place: where its files go.
        asked: bytes of the LoRAs by what is known of the files, where their size is to be found.
    """
    estimate, recipe = preflight.estimate, preflight.recipe
    before = sum(header.size for header in preflight.inputs.headers)
    average = place.hyper_model.stat().st_size if place.exists else estimate.average
    hyper = f"{place.hyper_model.name} ({format_size(average)}{', there already' if place.exists else ''})"
    size = estimate.loras if recipe.target is None else asked or estimate.loras
    count = format_count(len(recipe.ranks), "LoRA")
    loras = f"{count} {_text(lora_names(place.run, recipe.ranks)[0])} …"
    if recipe.budget is not None:
        loras = "LoRAs"
    elif recipe.target is not None:
        loras = "LoRAs, about" if asked else "LoRAs of a size that the merge finds, perhaps"
    lines = [
        (
            f"<b>{_text(hyper)}</b> and {loras} (<b>{format_size(size)}</b>): "
            f"{format_size(average + size)} in place of {format_size(before)}."
        ),
        (
            f"It takes <b>{format_duration(estimate.seconds)}</b>, {format_size(estimate.memory)} of memory and at most "
            f"{format_size(estimate.disk)} of disk with the cache."
        ),
    ]
    notes = [format_message("info", warning) for warning in preflight.warnings]
    return "".join(f"<p>{line}</p>" for line in lines) + "".join(notes)


def format_forecast_notes(found: ForecastCurve, recipe: Recipe, asked: int | None) -> str:
    """What the look at the files shows beside its curve: a share out of reach, unlike groups."""
    said = ""
    if asked is None and recipe.target is not None:
        shares = found.shared[-1]
        worst = min(range(len(shares)), key=shares.__getitem__)
        said += format_message(
            "info",
            f"{format_percent(recipe.target)} may be out of reach: LoRAs bring back about"
            f" {format_percent(shares[worst])} of {found.names[worst]} at most.",
        )
    groups = found.groups
    return said + (
        format_dissimilar_groups(found.names, groups.groups, groups.between)
        if groups.are_apart
        else ""
    )


def format_dissimilar_groups(
    names: Sequence[str], groups: Sequence[Sequence[int]], between: float
) -> str:
    """That checkpoints fall into groups which share little."""
    text = format_groups(names, groups, between)
    return format_message("info", f"{text[0].upper()}{text[1:]}.")


def format_job_status(now: JobStatus) -> str:
    """A running job with phase, percentage, time left and bar, or how it ended.

    The element carries the task's id: where the host draws a bar of its own, a script puts it here
    in place of ours, and of the percentage and the time, which that one says too.
    """
    notes = "".join(format_message("info", note) for note in now.notes)
    if now.outcome != "running":
        kind, word = _ENDINGS[now.outcome]
        said = now.message.removeprefix("stopped; ")
        text = f"{word}: {said}" if said else f"{word}: {now.title}, in {_clock(now.elapsed)}"
        return format_message(kind, text) + notes
    left = now.seconds_left
    time_left = "" if left is None else f", {format_duration(left)} left"
    phase = "stopping" if now.stopping else now.phase
    words = f"{now.title}: {phase}"
    share = f", {now.fraction:.0%}{time_left}"
    return (
        f'<div class="hm-progress" data-task="{_text(now.task)}" role="status">'
        f"<div class=hm-phase>{_text(words)}<span class=hm-share>{_text(share)}</span></div>"
        f'<div class=hm-bar><div style="width:{now.fraction:.1%}"></div></div></div>{notes}'
    )


def _name_cell(name: str, row: InspectedFile) -> str:
    problem = f"<div class=hm-problem>{_text(row.problem)}</div>" if row.problem else ""
    return _text(name) + problem


def format_count(count: int, noun: str) -> str:
    """A number of things in words."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def _text(text: str) -> str:
    return html.escape(text)
