"""Drawing checkpoints as hyper-model + LoRAs beside the originals, and looking at what was drawn.

Handlers: plain values in, plain values or `gr.update(...)` out, no widgets. The first arguments come
from the wiring (the host, the process's jobs), the rest from the browser. What is refused becomes a
message; it never leaves as an error.
"""

from __future__ import annotations

import base64
import functools
import re
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
from hyper_merge.operations.compare import records as comparison_files
from hyper_merge.operations.compare.compare import run_comparison
from hyper_merge.operations.compare.request import CompareRequest, PictureSettings
from hyper_merge.runs.manifest import Run, list_runs, load_run
from hyper_merge.runs.weighted_loras import checkpoint_names, find_row
from hyper_merge.runtime.progress import Progress
from hyper_merge.ui.handlers import merge as merging
from hyper_merge.ui.html import common as views
from hyper_merge.ui.html import compare as views_compare

_SHOWN: Final = (1600, 16_000)  # pixels on the page at most; the file has all of them
_QUALITY: Final = 92  # of the JPEG that the page gets
_LETTERS: Final = 2000  # of a prompt
_TITLE: Final = "pictures of "  # of our jobs, before the run's name
_PLACE: Final = "compare"  # where they are begun


@dataclass(frozen=True)
class CompareForm:
    """What the browser sends, in the order of the panel's widgets."""

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
    """Runs, the chosen one's checkpoints and comparisons, and what is shown; choices stay if they can."""
    found, _ = list_runs(host.folders())
    names = [each.name for each in found]
    chosen = next((each for each in found if each.name == run), found[0] if found else None)
    if chosen is None:
        said = (
            host.generator_info().problem or "Merge first; then the checkpoints can be drawn here."
        )
        return (
            gr.update(choices=[], value=None),
            *_nothing(),
            views_compare.introduction() + views.message("info", said),
        )
    known = list(checkpoint_names(chosen))
    kept = [name for name in checkpoints or () if name in known] if chosen.name == run else known
    drawn = comparison_files.comparison_names(chosen)
    is_shown = earlier in drawn and chosen.name == run
    value = earlier if is_shown else next(iter(drawn), None)
    return (
        gr.update(choices=names, value=chosen.name),
        gr.update(choices=known, value=kept),
        _comparisons(drawn, value),
        gr.update() if is_shown else _shown(host, chosen, value),
    )


def choose_run(host: Host, name: str | None) -> tuple[Any, Any, str]:
    """Its checkpoints, all of them picked, its comparisons, and the newest of those."""
    try:
        run = load_run(host.folders(), name or "")
    except HyperMergeError as error:
        return (*_nothing(), views.refused(error) if name else "")
    known, drawn = list(checkpoint_names(run)), comparison_files.comparison_names(run)
    value = next(iter(drawn), None)
    return (
        gr.update(choices=known, value=known),
        _comparisons(drawn, value),
        _shown(host, run, value),
    )


def order_of(form: CompareForm, samplers: Sequence[str]) -> CompareRequest:
    """What is asked for.

    Raises:
        PictureError: a field holds something else than it should.
    """
    sampler = form.sampler or ""
    if sampler not in samplers:
        raise PictureError(f"expected one of the samplers of the list, got {form.sampler!r}")
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
    if any(len(text) > _LETTERS for text in (*settings.prompts, settings.negative)):
        raise PictureError(f"expected prompts of at most {_LETTERS} letters; shorten them")
    return CompareRequest(
        form.run or "", tuple(form.checkpoints or ()), settings, form.average, form.difference
    )


def start_drawing(host: Host, jobs: Jobs, *values: Any) -> str:
    """Starts drawing, or says why not; `watch` follows it."""
    form = CompareForm(*values)
    try:
        atelier = host.generator_info()
        if atelier.problem:
            raise PictureError(atelier.problem)
        run = load_run(host.folders(), form.run or "")
        order = order_of(form, atelier.samplers)
        for name in order.checkpoints:
            find_row(run, name)
        work = functools.partial(_compare, host, order)
        jobs.start(f"{_TITLE}{run.name}", work, host.log, _PLACE)
    except HyperMergeError as error:
        return views.refused(error)
    return ""


def watch(
    jobs: Jobs, host: Host, name: str | None, *, begun: bool
) -> Iterator[tuple[str, Any, Any, Any]]:
    """As `merging.watch`, of jobs that draw; others are followed where they were begun.

    Args:
        jobs: the process's.
        host: where comparisons are.
        name: of the run that is chosen.
        begun: whether the job was begun just now; else one that has ended is no news.

    Yields:
        Status, Stop button, message; the list of comparisons once there is a new one, which shows it.
    """
    if jobs.last is None or jobs.last.standing.place != _PLACE:
        yield "", gr.update(interactive=False), gr.update(), gr.update()
        return
    job = jobs.last
    is_news = begun or job.standing.outcome == "running"
    shown: tuple[str, Any, Any] = ("", gr.update(), gr.update())
    for shown in merging.watch(jobs):
        yield (*shown, gr.update())
    now = job.standing
    if is_news and now.outcome == "done" and now.title == f"{_TITLE}{name}":
        yield (*shown, choose_run(host, name)[1])


def show_comparison(host: Host, name: str | None, earlier: str | None) -> str:
    """An earlier comparison."""
    try:
        run = load_run(host.folders(), name or "")
    except HyperMergeError as error:
        return views.refused(error) if name else ""
    return _shown(host, run, earlier)


def _compare(host: Host, order: CompareRequest, task: str, progress: Progress) -> str:
    with host.drawing(task) as (hosts, studio):
        both = progress.joined(hosts)
        both.report("starting", 0.0)
        run_comparison(order, studio, host.folders(), both)
    return ""  # no new run


def _shown(host: Host, run: Run, name: str | None) -> str:
    """HTML of a comparison; of what can be done here, where there is none."""
    if not name:
        return views_compare.introduction() + views.message("info", host.generator_info().problem)
    try:
        found = comparison_files.load_comparison(run, name)
        picture, _ = comparison_files.comparison_paths(run, name)
        source = _source(picture)
    except HyperMergeError as error:
        return views.refused(error)
    return views_compare.compared(found, picture, source)


def _source(path: Path) -> str:
    """The grid for the page, as a data URL: there is no route to the host's folders."""
    try:
        with Image.open(path) as picture:
            shown = picture.convert("RGB")
    except (OSError, ValueError) as error:
        raise PictureError(
            f"{path} cannot be shown ({error}); compare again, or delete the file"
        ) from error
    shown.thumbnail(_SHOWN, Image.Resampling.LANCZOS)
    stream = BytesIO()
    shown.save(stream, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _comparisons(names: Sequence[str], value: str | None) -> Any:
    """The list of comparisons; there is none to be seen where there are none."""
    return gr.update(choices=list(names), value=value, visible=bool(names))


def _number(name: str, value: float | None) -> float:
    if value is None:
        raise PictureError(f"{name}: expected a number, got nothing")
    return float(value)


def _seeds(text: str) -> tuple[int, ...]:
    words = re.split(r"[,\s]+", text.strip())
    if not all(re.fullmatch(r"\d{1,12}", word) for word in words):
        raise PictureError(f'seeds: expected whole numbers, such as "1, 2", got "{text:.60}"')
    return tuple(dict.fromkeys(map(int, words)))


def _nothing() -> tuple[Any, Any]:
    return gr.update(choices=[], value=[]), _comparisons([], None)
