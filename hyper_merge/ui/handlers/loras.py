"""Handles the tab "LoRAs" between jobs: what can be picked, what each choice needs, runs that are shown.

Handlers take and return plain values or `gr.update(...)`, no widgets. The first arguments come from the
wiring (the host, the process's jobs), the rest from the browser. A refusal becomes a message, never an
error.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import gradio as gr

from hyper_merge.errors import HyperMergeError
from hyper_merge.hosts.host import Host
from hyper_merge.hosts.job_queue import Jobs
from hyper_merge.operations.loras.inspect import LoraCatalogue
from hyper_merge.runs.lora_runs import is_lora_run, list_lora_runs, load_lora_run
from hyper_merge.runs.run import Run
from hyper_merge.ui.form import format_requested_size
from hyper_merge.ui.handlers.dropdowns import refill
from hyper_merge.ui.handlers.merge import watch_job
from hyper_merge.ui.html.common import format_message
from hyper_merge.ui.html.loras import format_shared_loras
from hyper_merge.ui.html.result import format_plot
from hyper_merge.ui.plots.canvas import draw_png
from hyper_merge.ui.plots.description import describe_explained
from hyper_merge.ui.plots.report import explained_plot

PLACE: Final = "loras"
"""The panel that starts these jobs."""

Action = Literal["share", "resize", "combine", "add", "subtract", "fit"]

_MOMENT: Final = 0.4  # seconds in which files are inspected before a page is told what is known
_FILE_SIZE: Final = (
    "The highest rank of a layer, such as 8. Or the size of the file, such as 50 MB. Or the share of"
    " the LoRA to keep, such as 95 %."
)


@dataclass(frozen=True)
class Choice:
    """Something that can be made of LoRAs.

    Attributes:
        action: What it is.
        about: What it does, as a sentence.
        button: The text of the button that starts it.
        size: What the field of sizes takes; empty where it has none.
        name: What the name is of.
        weighs: Whether every LoRA has a multiplier.
    """

    action: Action
    about: str
    button: str
    size: str = ""
    name: str = "Name of the file. Leave empty for the suggested name."
    weighs: bool = False


CHOICES: Final[Mapping[str, Choice]] = {
    "Distil into a few": Choice(
        "share",
        "Finds a few LoRAs that all the picked ones share. Each picked one is then a line of prompt tags.",
        "Distil",
        "One shared LoRA per rank, such as 32, 16. Or a total size, such as 100 MB. Or the share of"
        " every LoRA to keep, such as 95 %.",
        "Name of the shared LoRAs. Leave empty for the suggested name.",
    ),
    "Resize": Choice(
        "resize",
        "Writes each picked LoRA again as a smaller file, which keeps what matters most.",
        "Resize",
        _FILE_SIZE,
        "Name of the file, if one LoRA is picked. Leave empty for the suggested name.",
    ),
    "Combine into one": Choice(
        "combine",
        "Adds the picked LoRAs up to one, each with its multiplier.",
        "Combine",
        f"Leave empty to keep everything. {_FILE_SIZE}",
        weighs=True,
    ),
    "Add to a checkpoint": Choice(
        "add",
        "Writes a checkpoint that has the picked LoRAs built in, each with its multiplier.",
        "Add",
        weighs=True,
    ),
    "Subtract from a checkpoint": Choice(
        "subtract",
        "Writes a checkpoint without what the picked LoRAs add, such as ones that were built in before.",
        "Subtract",
        weighs=True,
    ),
    "Fit onto shared LoRAs": Choice(
        "fit",
        "Finds the prompt tags by which the shared LoRAs of a run come closest to a LoRA that was not"
        " distilled.",
        "Fit",
        "Of a private LoRA for what remains: a rank, such as 16, or the share of the LoRA to reach in"
        " all, such as 95 %. Leave empty for none.",
        name="Name of the fit. Leave empty for the file's.",
    ),
}
"""By what the tab calls them."""


@dataclass(frozen=True)
class LoraOutcome:
    """The result of a job of this tab, as the tab shows it."""

    html: str


def list_loras(
    host: Host, catalogue: LoraCatalogue, checkpoint: str | None, run: str | None
) -> tuple[str, Any, Any]:
    """Returns the host's LoRAs with what is known of each file, and updates checkpoints and runs.

    No file is read: the page asks for the facts that it lacks by `inspect_some_loras`.
    """
    runs = [row.name for row in list_lora_runs(host.folders())[0]]
    return (
        _to_json(catalogue, host.loras()),
        refill(list(host.checkpoints()), checkpoint),
        refill(runs, run, next(iter(runs), None)),
    )


def inspect_some_loras(host: Host, catalogue: LoraCatalogue, picked: str) -> str:
    """Inspects files for a moment, the picked ones first; returns the list with what is known then.

    The page asks again until it knows everything, and no longer than it is open.
    """
    listed, end = host.loras(), time.monotonic() + _MOMENT
    chosen = [name for name, _ in parse_lora_picks(picked) if name in listed]
    for name in dict.fromkeys([*chosen, *listed]):
        status = _status(listed[name])
        if status is not None:
            catalogue.inspect(listed[name], status)
        if time.monotonic() > end:
            break
    return _to_json(catalogue, listed)


def parse_lora_picks(text: str) -> list[tuple[str, str]]:
    """Returns name and multiplier of the picked LoRAs as a browser sends them; none of anything else."""
    try:
        rows = json.loads(text or "[]")
        return [(str(name), str(multiplier)) for name, multiplier in rows]
    except (ValueError, TypeError):
        return []


def show_choice(text: str | None) -> tuple[Any, ...]:
    """Returns what a choice does, updates of the fields that it needs, and of the button at last.

    The fields are emptied: what was meant for another choice would be refused, or mean something else.
    """
    choice = choice_of(text)
    return (
        _about(choice),
        gr.update(visible=bool(choice.size), info=choice.size, value=""),
        gr.update(visible=choice.action in ("add", "subtract")),
        gr.update(visible=choice.action == "fit"),
        gr.update(info=choice.name, value=""),
        gr.update(visible=choice.weighs),
        "",
        gr.update(value=choice.button),
    )


def change_choice(text: str | None, shown: str | None) -> tuple[Any, ...]:
    """Returns the choice whose fields are shown from now on, and what `show_choice` returns.

    Changes nothing where they are shown already: gradio 4 takes a choice that comes with copied settings for
    the user's.
    """
    if text == shown:
        return (gr.update(),) * 9
    return (text, *show_choice(text))


def choice_of(text: str | None) -> Choice:
    """Returns the choice that the tab calls so; the first one for anything else."""
    return CHOICES.get(text or "", next(iter(CHOICES.values())))


def _about(choice: Choice) -> str:
    return f"<p class=hm-hint>{choice.about}</p>"


def watch_lora_job(jobs: Jobs, *, begun: bool) -> Iterator[tuple[Any, ...]]:
    """Follows a job of this tab, as `watch_job`; other jobs are followed where they were started.

    Args:
        jobs: the jobs of the process.
        begun: whether the job was started just now; otherwise the end of a job is not reported again.

    Yields:
        Status, Stop button, message, the result, and the task that wrote files.
    """
    unchanged = (gr.update(), gr.update())
    if jobs.last is None or jobs.last.status.place != PLACE:
        yield ("", gr.update(interactive=False), gr.update(), *unchanged)
        return
    job = jobs.last
    is_news = begun or job.status.outcome == "running"
    updates: tuple[Any, ...] = ("", gr.update(), gr.update())
    for updates in watch_job(jobs):
        yield (*updates, *unchanged)
    status = job.status
    if is_news and isinstance(status.result, LoraOutcome):
        yield (*updates, status.result.html, status.task)


def show_lora_run(host: Host, name: str | None) -> Any:
    """Returns card and curve of a run of LoRAs; changes nothing for one of checkpoints."""
    if not is_lora_run(host.folders(), name or ""):
        return gr.update()
    try:
        return draw_lora_run(load_lora_run(host.folders(), name or ""))
    except HyperMergeError as error:
        return format_message("bad", str(error))


def draw_lora_run(run: Run, *, is_new: bool = False) -> str:
    """Returns a run of LoRAs with what its first LoRAs explain, as a curve.

    Args:
        run: the run.
        is_new: whether it was made just now.
    """
    plot = draw_png(explained_plot(run.report, of_loras=True))
    shown = format_shared_loras(run, is_new=is_new)
    return shown + format_plot(plot, describe_explained(run.report))


def copy_lora_settings(host: Host, name: str | None) -> tuple[Any, ...]:
    """Returns picks, choice, what `change_choice` returns, with the size of a run of LoRAs; a message.

    Changes nothing for a run of checkpoints.
    """
    if not is_lora_run(host.folders(), name or ""):
        return (gr.update(),) * 12
    try:
        run = load_lora_run(host.folders(), name or "")
    except HyperMergeError as error:
        return (*(gr.update(),) * 11, format_message("bad", str(error)))
    names = {path.resolve(): listed for listed, path in host.loras().items()}
    picked = [names.get(path.resolve()) for path in run.recipe.models]
    kept = [(listed, "1") for listed in picked if listed is not None]
    gone = len(picked) - len(kept)
    text = f"The settings of {run.name} were copied to the form."
    if gone:
        text += f" {gone} of its LoRAs are no longer in the list."
    first = next(iter(CHOICES))
    about, size, *others = show_choice(first)
    return (
        json.dumps(kept),
        first,
        first,
        about,
        {**size, "value": format_requested_size(run.recipe)},
        *others,
        format_message("info" if gone else "good", text),
    )


def _to_json(catalogue: LoraCatalogue, listed: Mapping[str, Path]) -> str:
    """Returns the list for the page's script: one object per file, with its facts where known."""
    return json.dumps([_row(catalogue, name, path) for name, path in listed.items()])


def _row(catalogue: LoraCatalogue, name: str, path: Path) -> dict[str, Any]:
    status = _status(path)
    if status is None:
        return {"name": name, "known": True, "problem": "file not found; press Refresh"}
    row: dict[str, Any] = {"name": name, "size": status.st_size, "time": status.st_mtime}
    lora = catalogue.known(path, status)
    if lora is None:
        return row
    facts = {"family": lora.family, "rank": lora.rank, "problem": lora.problem}
    return {**row, "known": True, "ours": lora.is_made, **facts}


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (OSError, ValueError):
        return None
