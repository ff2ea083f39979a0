"""Handles the tab "Compare": draws with hyper-model + LoRAs and with the originals, shows results.

Handlers take and return plain values or `gr.update(...)`, no widgets. The first arguments come from the
wiring (the host, the process's jobs), the rest from the browser. A refusal becomes a message, never an
error.
"""

from __future__ import annotations

import base64
import functools
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import gradio as gr
from PIL import Image

from hyper_merge.errors import HyperMergeError, PictureError
from hyper_merge.hosts.host import Host
from hyper_merge.hosts.job_queue import Jobs
from hyper_merge.hosts.tasks import compare_task
from hyper_merge.operations.compare.records import (
    comparison_names,
    comparison_paths,
    load_comparison,
)
from hyper_merge.operations.compare.request import CompareRequest, PictureSettings
from hyper_merge.runs.run import Run, list_runs, load_run
from hyper_merge.runs.weighted_loras import checkpoint_names, find_row
from hyper_merge.runtime.progress import Progress
from hyper_merge.ui.handlers.merge import watch_job
from hyper_merge.ui.handlers.use import format_vanished_run
from hyper_merge.ui.html.common import format_message, format_refusal
from hyper_merge.ui.html.compare import format_compare_introduction, format_comparison

_PAGE_SIZE: Final = (1600, 16_000)  # pixels on the page at most; the file has all of them
_QUALITY: Final = 92  # of the JPEG that the page gets
_MAX_CHARACTERS: Final = 2000  # of a prompt
_TITLE: Final = "pictures of "  # of these jobs, before the run's name
# What damaged pictures make Pillow raise, and ones that say they are enormous.
_DAMAGES: Final = (SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_PLACE: Final = "compare"  # the panel that starts these jobs


@dataclass(frozen=True)
class CompareForm:
    """The values that the browser sends, in the order of the panel's widgets."""

    run: str | None
    checkpoints: Sequence[str] | None
    prompts: str
    negative: str
    sampler: str | None
    steps: float | None
    cfg_scale: float | None
    width: float | None
    height: float | None
    seeds: str
    average: bool
    difference: bool


def list_comparisons(
    host: Host, run: str | None, checkpoints: Sequence[str] | None, earlier: str | None
) -> tuple[Any, ...]:
    """Updates the lists of runs, checkpoints and comparisons, and the comparison that is shown.

    The current choices stay if they still exist. Of a run without any, None, all checkpoints are picked.
    """
    runs, _ = list_runs(host.folders())
    names = [row.name for row in runs]
    chosen = next((row for row in runs if row.name == run), runs[0] if runs else None)
    if chosen is None:
        text = host.generator_info().problem or "There are no runs yet; make one under Merge."
        return (
            gr.update(choices=[], value=None),
            *_nothing(),
            format_compare_introduction() + format_message("info", text),
        )
    known = list(checkpoint_names(chosen))
    is_new = checkpoints is None or chosen.name != run
    kept = known if is_new else [name for name in checkpoints or () if name in known]
    drawn = comparison_names(chosen)
    is_current = earlier in drawn and chosen.name == run
    value = earlier if is_current else next(iter(drawn), None)
    return (
        gr.update(choices=names, value=chosen.name),
        gr.update(choices=known, value=kept),
        _comparisons(drawn, value),
        gr.update() if is_current else _format_record(host, chosen, value),
    )


def compare_run(host: Host, name: str) -> tuple[Any, ...]:
    """Picks a run with all its checkpoints, as `list_comparisons` does on a new page.

    The last value is a message that says where that run is gone.
    """
    return (*list_comparisons(host, name, None, None), format_vanished_run(host, name))


def choose_compared_run(host: Host, name: str | None) -> tuple[Any, Any, str]:
    """Updates the checkpoints, all of them picked, and the comparisons, and shows the newest one."""
    try:
        run = load_run(host.folders(), name or "")
    except HyperMergeError as error:
        return (*_nothing(), format_refusal(error) if name else "")
    known, drawn = list(checkpoint_names(run)), comparison_names(run)
    value = next(iter(drawn), None)
    return (
        gr.update(choices=known, value=known),
        _comparisons(drawn, value),
        _format_record(host, run, value),
    )


def compare_request(form: CompareForm, samplers: Sequence[str]) -> CompareRequest:
    """Returns the request that a form describes.

    Raises:
        PictureError: a field has no valid value.
    """
    sampler = form.sampler or ""
    if sampler not in samplers:
        raise PictureError(f"expected a sampler of the list, got {form.sampler!r}", hint="pick one")
    settings = PictureSettings(
        prompts=tuple(filter(None, (line.strip() for line in form.prompts.splitlines()))),
        negative=form.negative.strip(),
        sampler=sampler,
        steps=int(_number("steps", form.steps)),
        cfg_scale=_number("CFG scale", form.cfg_scale),
        width=int(_number("width", form.width)),
        height=int(_number("height", form.height)),
        seeds=_seeds(form.seeds),
    )
    if any(len(text) > _MAX_CHARACTERS for text in (*settings.prompts, settings.negative)):
        raise PictureError(
            f"expected prompts of at most {_MAX_CHARACTERS} characters", hint="shorten them"
        )
    return CompareRequest(
        form.run or "", tuple(form.checkpoints or ()), settings, form.average, form.difference
    )


def start_comparison(host: Host, jobs: Jobs, *values: Any) -> str:
    """Starts a comparison; returns why not, or "" if it started. `watch_comparison` follows it."""
    form = CompareForm(*values)
    try:
        generator = host.generator_info()
        if generator.problem:
            raise PictureError(generator.problem)
        run = load_run(host.folders(), form.run or "")
        request = compare_request(form, generator.samplers)
        for name in request.checkpoints:
            find_row(run, name)
        work = functools.partial(_compare, host, request)
        jobs.start(f"{_TITLE}{run.name}", work, host.log, _PLACE)
    except HyperMergeError as error:
        return format_refusal(error)
    return ""


def watch_comparison(
    jobs: Jobs, host: Host, name: str | None, refusal: str = "", *, begun: bool
) -> Iterator[tuple[str, Any, Any, Any]]:
    """Follows a job that draws, as `watch_job`; other jobs are followed where they were started.

    Args:
        jobs: the jobs of the process.
        host: the program around the tab.
        name: the chosen run.
        refusal: why no job was started; it goes once the job that was in the way has ended.
        begun: whether the job was started just now; otherwise the end of a job is not reported again.

    Yields:
        Status, Stop button, message, and an update of the comparisons once there is a new one.
    """
    if jobs.last is None or jobs.last.status.place != _PLACE:
        nothing = "", gr.update(interactive=False), gr.update(), gr.update()
        yield nothing
        if refusal and jobs.last is not None and jobs.last.status.outcome == "running":
            jobs.last.wait(None)
            yield (*nothing[:2], "", nothing[3])
        return
    job = jobs.last
    is_news = begun or job.status.outcome == "running"
    updates: tuple[str, Any, Any] = ("", gr.update(), gr.update())
    for updates in watch_job(jobs):
        yield (*updates, gr.update())
    status = job.status
    if is_news and status.outcome == "done" and status.title == f"{_TITLE}{name}":
        yield (*updates, choose_compared_run(host, name)[1])


def show_comparison(host: Host, name: str | None, earlier: str | None) -> str:
    """Returns an earlier comparison."""
    try:
        run = load_run(host.folders(), name or "")
    except HyperMergeError as error:
        return format_refusal(error) if name else ""
    return _format_record(host, run, earlier)


def _compare(host: Host, request: CompareRequest, task: str, progress: Progress) -> str:
    compare_task(host, request, task, progress)
    return ""  # no new run


def _format_record(host: Host, run: Run, name: str | None) -> str:
    """Returns a comparison; an introduction if there is none."""
    if not name:
        return format_compare_introduction() + format_message("info", host.generator_info().problem)
    try:
        record = load_comparison(run, name)
        grid, _ = comparison_paths(run, name)
        source = _data_url(grid)
    except HyperMergeError as error:
        return format_refusal(error)
    return format_comparison(record, grid, source)


def _data_url(path: Path) -> str:
    """Returns the grid as a data URL, since no route leads to the host's folders."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            thumbnail = picture.convert("RGB")
    except (OSError, ValueError, *_DAMAGES) as error:
        raise PictureError(
            f"{path} cannot be shown ({error})", hint="compare again, or delete the file"
        ) from error
    thumbnail.thumbnail(_PAGE_SIZE, Image.Resampling.LANCZOS)
    stream = BytesIO()
    thumbnail.save(stream, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _comparisons(names: Sequence[str], value: str | None) -> Any:
    """Updates the list of comparisons, which is hidden while it is empty."""
    return gr.update(choices=list(names), value=value, visible=bool(names))


def _number(name: str, value: float | None) -> float:
    if value is None:
        raise PictureError(f"{name}: expected a number, got nothing")
    return float(value)


def _seeds(text: str) -> tuple[int, ...]:
    seeds = re.split(r"[,\s]+", text.strip())
    if not all(re.fullmatch(r"\d{1,12}", seed) for seed in seeds):
        raise PictureError(f'seeds: expected whole numbers, such as "1, 2", got "{text:.60}"')
    return tuple(dict.fromkeys(map(int, seeds)))


def _nothing() -> tuple[Any, Any]:
    """Returns updates that empty the lists of checkpoints and comparisons."""
    return gr.update(choices=[], value=[]), _comparisons([], None)
