"""Starting what follows a merge: a fit, a new run, a checkpoint, LoRAs, a look at the originals.

Handlers: plain values in, plain values or `gr.update(...)` out, no widgets. The first arguments come
from the wiring (the host, the process's jobs), the rest from the browser. What is refused becomes a
message; it never leaves as an error.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from hyper_merge.errors import HyperMergeError, RecipeError
from hyper_merge.hosts.host import Host, require_listed_file
from hyper_merge.hosts.job_queue import Jobs
from hyper_merge.hosts.tasks import host_turn
from hyper_merge.operations.deletable import find_deletable
from hyper_merge.operations.export import ExportRequest, run_export
from hyper_merge.operations.extend import ExtendRequest, run_extend
from hyper_merge.operations.extract.extract import ExtractRequest, run_extract
from hyper_merge.operations.fit.fit import run_fit
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.restore.restore import RestoreRequest, run_restore
from hyper_merge.recipe.parsing import parse_name, parse_share, plain_value
from hyper_merge.recipe.recipe import SettingError
from hyper_merge.runs.manifest import Run, load_run
from hyper_merge.runtime.progress import Progress
from hyper_merge.ui.handlers.use import SAME_PRECISION, Outcome, Panel
from hyper_merge.ui.html import common as views
from hyper_merge.ui.html import use as views_use

_LABELS: Final = {
    "name": "Name",
    "topup": "Private LoRA",
    "rank": "Rank",
    "dtype": "Stored precision",
    "mix": "Mix",
}
_Do = Callable[[Progress], object]


def start_fit(host: Host, jobs: Jobs, *asked: Any) -> str:
    """Starts a fit: of run, checkpoint, private LoRA, name, whether to replace."""
    run, checkpoint, topup, name, replace = asked

    def order() -> tuple[str, _Do]:
        wanted = FitRequest(
            run=_run(host, run).name,
            checkpoint=_file(host, checkpoint, "Checkpoint"),
            name=_words(name),
            topup=_words(topup),  # type: ignore[arg-type]  # parsed by the order
            overwrite=bool(replace),
        )
        return f"the fit of {checkpoint}", functools.partial(_fit, host, wanted)

    return _start(host, jobs, "fit", order)


def start_absorb(host: Host, jobs: Jobs, run: str, checkpoint: str, name: str) -> str:
    """Starts a new run with one checkpoint more."""

    def order() -> tuple[str, _Do]:
        path = _file(host, checkpoint, "Checkpoint")
        wanted = ExtendRequest(_run(host, run).name, (path,), _words(name))
        return f"{run} with {checkpoint}", functools.partial(_absorb, host, wanted)

    return _start(host, jobs, "fit", order)


def start_restore(host: Host, jobs: Jobs, run: str, checkpoint: str, dtype: str, name: str) -> str:
    """Starts writing a checkpoint of the run."""

    def order() -> tuple[str, _Do]:
        if not checkpoint:
            raise RecipeError("Pick the checkpoint that is to come back.")
        wanted = RestoreRequest(
            run=_run(host, run).name,
            shares={checkpoint: 1.0},
            to=_to(host, name),
            dtype=None if dtype == SAME_PRECISION else dtype,
        )
        return f"the checkpoint {checkpoint}", functools.partial(_restore, host, wanted)

    return _start(host, jobs, "restore", order)


def start_mix(host: Host, jobs: Jobs, run: str, shares: str, name: str) -> str:
    """Starts writing a mixture as a checkpoint."""

    def order() -> tuple[str, _Do]:
        wanted = RestoreRequest(_run(host, run).name, _shares(shares), to=_to(host, name))
        return "the mixture", functools.partial(_restore, host, wanted)

    return _start(host, jobs, "mix", order)


def start_export(
    host: Host, jobs: Jobs, run: str, checkpoints: Sequence[str], rank: str, replace: bool
) -> str:
    """Starts writing one LoRA per checkpoint."""

    def order() -> tuple[str, _Do]:
        wanted = ExportRequest(
            run=_run(host, run).name,
            checkpoints=tuple(checkpoints or ()) or None,
            rank=_number(rank),
            overwrite=bool(replace),
        )
        return "the LoRAs", functools.partial(_export, host, wanted)

    return _start(host, jobs, "export", order)


def start_safe(host: Host, jobs: Jobs, run: str, threshold: str) -> str:
    """Starts looking what is safe to delete."""

    def order() -> tuple[str, _Do]:
        try:
            share = parse_share(_words(threshold) or "99%")
        except RecipeError as error:
            raise RecipeError(f"Threshold: {error}") from None
        name = _run(host, run).name
        return "the look at the originals", functools.partial(_safe, host, name, share or 1.0)

    return _start(host, jobs, "safe", order)


def start_extract(host: Host, jobs: Jobs, *asked: Any) -> str:
    """Starts an extraction: of base, checkpoint, rank, name."""
    base, checkpoint, rank, name = asked

    def order() -> tuple[str, _Do]:
        wanted = ExtractRequest(
            base=_file(host, base, "From"),
            checkpoint=_file(host, checkpoint, "To"),
            rank=_number(rank),
            name=_words(name),
        )
        return f"the LoRA from {base} to {checkpoint}", functools.partial(_extract, host, wanted)

    return _start(host, jobs, "extract", order)


def _start(host: Host, jobs: Jobs, panel: Panel, order: Callable[[], tuple[str, _Do]]) -> str:
    try:
        title, do = order()
        jobs.start(title, functools.partial(_in_turn, host, do), host.log, panel)
    except SettingError as error:
        return views.message("bad", f"{_LABELS.get(error.key, error.key)}: {error.problem}")
    except HyperMergeError as error:
        return views.refused(error)
    return ""


def _in_turn(host: Host, do: _Do, task: str, progress: Progress) -> object:
    with host_turn(host, task, progress) as both:
        found = do(both)
        host.refresh()
    return found


def _fit(host: Host, wanted: FitRequest, progress: Progress) -> Outcome:
    fitted = run_fit(wanted, host.folders(), progress)
    run = load_run(host.folders(), wanted.run)
    tags = fitted.tags(run) if fitted.differs else ""
    said = views_use.fitted(fitted, run)
    title = host.checkpoint_title(run.hyper_model) or ""
    shown = (run.name, fitted.row.name)
    return Outcome(said, tags, shown, title, wrote=bool(fitted.topups))


def _absorb(host: Host, wanted: ExtendRequest, progress: Progress) -> str:
    return run_extend(wanted, host.folders(), progress).place.run


def _restore(host: Host, wanted: RestoreRequest, progress: Progress) -> Outcome:
    found = run_restore(wanted, host.folders(), progress)
    return Outcome(views_use.restored(found), wrote=True)


def _export(host: Host, wanted: ExportRequest, progress: Progress) -> Outcome:
    exported = run_export(wanted, host.folders(), progress)
    return Outcome(views_use.exported(exported, wanted.rank), wrote=True)


def _safe(host: Host, run: str, threshold: float, progress: Progress) -> Outcome:
    found = find_deletable(run, threshold, host.folders(), progress)
    return Outcome(views_use.safety(found))


def _extract(host: Host, wanted: ExtractRequest, progress: Progress) -> Outcome:
    found = run_extract(wanted, progress, host.folders())
    return Outcome(views_use.extracted(found), wrote=True)


def _run(host: Host, name: str | None) -> Run:
    if not name:
        raise RecipeError("Pick a run; one is made under Merge.")
    return load_run(host.folders(), name)


def _file(host: Host, name: str | None, label: str) -> Path:
    """The file of a name in the host's list."""
    if not name:
        raise RecipeError(f"{label}: pick a checkpoint.")
    return require_listed_file(name, host.checkpoints())


def _to(host: Host, name: str | None) -> Path | None:
    """Where a checkpoint of that name goes; None for the suggestion."""
    words = _words(name)
    if words is None:
        return None
    try:
        return host.folders().models / f"{parse_name(words)}.safetensors"
    except RecipeError as error:
        raise SettingError("name", str(error)) from None


def _shares(text: str) -> dict[str, float]:
    """By checkpoint, from the sliders."""
    try:
        found = json.loads(text or "{}")
        shares = {str(name): float(share) for name, share in found.items()}
    except (ValueError, TypeError, AttributeError):
        raise RecipeError("Mix: expected a number for each checkpoint") from None
    present: Mapping[str, float] = {name: share for name, share in shares.items() if share}
    if not present:
        raise RecipeError("All sliders are at 0: that is the hyper-model itself. Move one.")
    return dict(present)


def _words(text: str | None) -> str | None:
    return (text or "").strip() or None


def _number(text: str | None) -> Any:
    """The number in a field, or what else stands there, which the order refuses; None for nothing."""
    words = _words(text)
    return None if words is None else plain_value(words)
