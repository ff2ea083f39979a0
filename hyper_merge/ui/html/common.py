"""Formats the HTML of the tab "Merge", and of messages, tables and progress for all tabs.

Functions take text and return HTML; every name is escaped.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

from hyper_merge.errors import HyperMergeError, SameMergeError
from hyper_merge.hosts.job_queue import BusyError, JobStatus, in_one_line
from hyper_merge.loras.prompt_tags import lora_names
from hyper_merge.operations.merge.estimate import estimate_merge
from hyper_merge.operations.merge.plan import ForecastCurve
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.operations.merge.training_rounds import with_training
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runs.folders import Place
from hyper_merge.runs.report_text import format_groups
from hyper_merge.runtime.formatting import format_count, format_duration, format_size
from hyper_merge.ui.html.names import format_text

MessageKind = Literal["info", "good", "bad"]

_MOST_NOTES: Final = 5  # that are shown at once
_ENDINGS: Final[Mapping[str, tuple[MessageKind, str]]] = {
    "done": ("good", "Done"),
    "stopped": ("info", "Stopped"),
    "refused": ("bad", "Failed"),
    "failed": ("bad", "Unexpected error; see the log for details"),
}


def format_message(kind: MessageKind, text: str) -> str:
    """Returns a box with one message; nothing for an empty text."""
    return (
        f'<div class="hm-message hm-{kind}" role="status">{format_text(text)}</div>' if text else ""
    )


def format_notes(notes: Sequence[str]) -> str:
    """Returns a box for each remark; of many all but the first ones are folded away."""
    boxes = [format_message("info", note) for note in notes]
    shown, folded = boxes[:_MOST_NOTES], boxes[_MOST_NOTES:]
    more = f"<summary>{format_count(len(folded), 'more remark')}</summary>{''.join(folded)}"
    return "".join(shown) + (f"<details class=hm-more>{more}</details>" if folded else "")


def format_unexpected_error(error: BaseException) -> str:
    """Returns the message for an unexpected error."""
    return format_message("bad", f"Unexpected error; see the log for details: {in_one_line(error)}")


def format_refusal(error: HyperMergeError) -> str:
    """Returns the reason why something did not start; what runs or is made already is no error."""
    is_harmless = isinstance(error, BusyError | SameMergeError)
    return format_message("info" if is_harmless else "bad", str(error))


def format_hint(text: str) -> str:
    """Returns a remark in small grey letters."""
    return f"<p class=hm-hint>{format_text(text)}</p>"


def format_percent(share: float) -> str:
    """Returns a share 0..1 in percent; only 1 and more become 100 %.

    >>> format_percent(0.7536), format_percent(0.99996), format_percent(1.0)
    ('75.4 %', '99.9 %', '100 %')
    """
    if share >= 1:
        return "100 %"
    return f"{min(round(share * 100, 1), 99.9) + 0.0:.1f} %"  # + 0.0: no negative zero


def format_merge_introduction() -> str:
    """Returns the text that is shown until there is a result."""
    return (
        "<div class=hm-intro><h3>What you get</h3>"
        "<p>One <b>hyper-model</b>, the average of the checkpoints, and a few <b>LoRAs</b> that all "
        "checkpoints share. For every checkpoint you get one line of prompt tags that turns the "
        "hyper-model into a close approximation of it.</p>"
        "<p>A report shows how close, so that you can decide which files to keep. A merge never deletes "
        "or replaces existing files.</p></div>"
    )


def format_table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],  # cells in HTML
    numeric: Iterable[int] = (),  # columns to be aligned at the right
    attributes: Sequence[str] = (),  # of every row, in HTML
) -> str:
    """Returns a table, from cells that are HTML and a head that is text."""
    right = set(numeric)

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=hm-number' if place in right else ''}>{value}</{tag}>"
            for place, value in enumerate(values)
        )

    tags = (f"<tr {text}>" for text in attributes) if attributes else itertools.repeat("<tr>")
    body = "".join(f"{tag}{cells('td', row)}</tr>" for tag, row in zip(tags, rows, strict=False))
    top = cells("th", [_text(name) for name in head])
    return (
        f'<div class="hm-scroll"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def format_merge_plan(preflight: Preflight, place: Place, forecast_size: int | None = None) -> str:
    """Returns the files that a merge will write, and the time and memory that it will take.

    Args:
        preflight: the validated recipe.
        place: where its files go.
        forecast_size: expected bytes of the LoRAs, where the recipe asks for a share.
    """
    estimate, recipe = estimate_merge(preflight), preflight.recipe
    before = sum(header.size for header in preflight.inputs.headers)
    average = place.size_of_hyper_model(estimate.average)
    hyper = f"{place.hyper_model.name} ({format_size(average)}{', exists already' if place.exists else ''})"
    size = recipe.budget or (recipe.target and forecast_size) or estimate.loras
    first, more = _text(lora_names(place.run, recipe.ranks)[0]), " …" if recipe.ranks[1:] else ""
    loras, about = f"{format_count(len(recipe.ranks), 'LoRA')} {first}{more}", ""
    if recipe.finds_ranks:
        loras = "LoRAs"
    if recipe.budget is not None:
        about = "at most "
    if recipe.target is not None:
        about = "about " if forecast_size else "as large as the share takes, perhaps "
    lines = [
        (
            f"<b>{_text(hyper)}</b> and {loras} ({about}<b>{format_size(size)}</b>{in_8_bits(recipe)}): "
            f"{format_size(average + size)} instead of {format_size(before)}."
        ),
        (
            f"It takes <b>{format_duration(estimate.seconds)}</b>{with_training(preflight.rounds)},"
            f" {format_size(estimate.memory)} of memory and at most {format_size(estimate.disk)} of disk"
            " space including the cache."
        ),
    ]
    return "".join(f"<p>{line}</p>" for line in lines) + format_notes(preflight.warnings)


def in_8_bits(recipe: Recipe) -> str:
    """Returns words behind the size of LoRAs that are in 8 bits, which not every machine can load."""
    return ", in 8 bits" if recipe.factors_dtype == "float8" else ""


def format_forecast_notes(
    forecast: ForecastCurve, recipe: Recipe, forecast_size: int | None
) -> str:
    """Returns the messages below the curve: a share that is out of reach, dissimilar groups.

    Args:
        forecast: the curve.
        recipe: what the form describes.
        forecast_size: expected bytes of the LoRAs; None where its share cannot be reached.
    """
    text = ""
    if forecast_size is None and recipe.target is not None:
        shares = forecast.shared[-1]
        worst = min(range(len(shares)), key=shares.__getitem__)
        text += format_message(
            "info",
            f"{format_percent(recipe.target)} may be out of reach: for {forecast.names[worst]} LoRAs can"
            f" explain about {format_percent(shares[worst])} at most.",
        )
    groups = forecast.groups
    return text + (
        format_dissimilar_groups(forecast.names, groups.groups, groups.between)
        if groups.are_apart
        else ""
    )


def format_dissimilar_groups(
    names: Sequence[str], groups: Sequence[Sequence[int]], between: float
) -> str:
    """Returns the message that checkpoints fall into groups with little in common."""
    text = format_groups(names, groups, between)
    return format_message("info", f"{text[0].upper()}{text[1:]}.")


def format_job_status(status: JobStatus) -> str:
    """Returns phase, percentage, time left and bar of a running job, or how it ended.

    The element carries the task's id: where the host draws its own bar, a script puts it here instead
    ours, which then hides the percentage and the time too.
    """
    notes = format_notes(status.notes)
    if status.outcome != "running":
        kind, word = _ENDINGS[status.outcome]
        reason = status.message.removeprefix("stopped; ")
        summary = reason or f"{status.title}, in {_format_clock(status.elapsed)}"
        message = format_message(kind, f"{word}: {summary}")
        marks = f'data-ended="{_text(status.task)}" data-outcome={status.outcome}'
        return f"<div {marks}>{message}</div>{notes}"
    left = status.seconds_left
    time_left = "" if left is None else f", {format_duration(left)} left"
    phase = "stopping" if status.stopping else status.phase
    title = f"{status.title}: {phase}"
    share = f", {status.fraction:.0%}{time_left}"
    return (
        f'<div class="hm-progress" data-task="{_text(status.task)}" role="status"'
        f" data-percent={status.fraction * 100:.0f}>"
        f"<div class=hm-phase>{_text(title)}<span class=hm-share>{_text(share)}</span></div>"
        f'<div class=hm-bar><div style="width:{status.fraction:.1%}"></div></div></div>{notes}'
    )


def _format_clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def _text(text: str) -> str:
    return html.escape(text)
