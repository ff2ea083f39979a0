"""Handles the buttons of the tab "Use" that start jobs: fits, new runs, checkpoints, LoRAs, checks.

Handlers take and return plain values or `gr.update(...)`, no widgets. The first arguments come from the
wiring (the host, the process's jobs), the rest from the browser. A refusal becomes a message, never an
error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from hyper_merge.errors import HyperMergeError, RecipeError, settings_placed
from hyper_merge.hosts.host import Host, require_listed_file
from hyper_merge.hosts.job_queue import Jobs
from hyper_merge.hosts.tasks import turn_task
from hyper_merge.operations.deletable import find_deletable
from hyper_merge.operations.export import ExportRequest, run_export
from hyper_merge.operations.extend import ExtendRequest, run_extend
from hyper_merge.operations.extract.extract import ExtractRequest, run_extract
from hyper_merge.operations.fit.fit import run_fit
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.restore.request import RestoreRequest
from hyper_merge.operations.restore.restore import run_restore
from hyper_merge.recipe.parsing import parse_name, parse_share
from hyper_merge.recipe.plain_values import plain_value
from hyper_merge.runs.run import Run, load_run
from hyper_merge.runtime.checked_json import parse_json
from hyper_merge.runtime.progress import Progress
from hyper_merge.ui.handlers.use import SAME_PRECISION, Panel, PanelOutcome
from hyper_merge.ui.html.common import format_refusal
from hyper_merge.ui.html.use import (
    format_deletion_verdicts,
    format_exported_loras,
    format_extracted_lora,
    format_fit_result,
    format_restored_checkpoint,
)

_LABELS: Final = {
    "name": "Name",
    "topup": "Private LoRA",
    "rank": "Rank",
    "dtype": "Precision",
    "mix": "Mix",
    "threshold": "Threshold",
    "damaged": "Damaged files",
}
_Work = Callable[[Progress], object]
_Value = TypeVar("_Value")


def start_fit(
    host: Host,
    jobs: Jobs,
    run: str | None,
    checkpoint: str | None,
    topup: str | None,
    name: str | None,
    replace: bool,
    damaged: bool,
) -> str:
    """Starts a fit; returns why not, or "" if it started."""

    def prepare() -> _Work:
        values = {
            "run": _run(host, run).name,
            "checkpoint": _file(host, checkpoint, "Checkpoint"),
            "name": _entered(name),
            "topup": _entered(topup),
            "overwrite": bool(replace),
            "damaged": "accept" if damaged else "refuse",
        }
        request = FitRequest.parse(values, _label)
        return functools.partial(_fit, host, request)

    return _start(host, jobs, "fit", f"the fit of {checkpoint}", prepare)


def start_extension(host: Host, jobs: Jobs, run: str, checkpoint: str, name: str) -> str:
    """Starts a new run with one more checkpoint; returns why not, or "" if it started."""

    def prepare() -> _Work:
        path = _file(host, checkpoint, "Checkpoint")
        values = {"run": _run(host, run).name, "checkpoints": (path,), "name": _entered(name)}
        request = ExtendRequest.parse(values, _label)
        return functools.partial(_extend, host, request)

    return _start(host, jobs, "fit", f"{run} with {checkpoint}", prepare)


def start_restore(host: Host, jobs: Jobs, run: str, checkpoint: str, dtype: str, name: str) -> str:
    """Starts writing a checkpoint of the run; returns why not, or "" if it started."""

    def prepare() -> _Work:
        if not checkpoint:
            raise RecipeError("Pick the checkpoint to restore.")
        values = {
            "run": _run(host, run).name,
            "shares": {checkpoint: 1.0},
            "to": _path(host, name),
            "dtype": None if dtype == SAME_PRECISION else dtype,
        }
        request = RestoreRequest.parse(values, _label)
        return functools.partial(_restore, host, request)

    return _start(host, jobs, "restore", f"the checkpoint {checkpoint}", prepare)


def start_mixture(host: Host, jobs: Jobs, run: str, shares: str, name: str) -> str:
    """Starts writing a mixture as a checkpoint; returns why not, or "" if it started."""

    def prepare() -> _Work:
        values = {"run": _run(host, run).name, "shares": _shares(shares), "to": _path(host, name)}
        request = RestoreRequest.parse(values, _label)
        return functools.partial(_restore, host, request)

    return _start(host, jobs, "mix", "the mixture", prepare)


def start_export(
    host: Host, jobs: Jobs, run: str, checkpoints: Sequence[str], rank: str, replace: bool
) -> str:
    """Starts writing one LoRA per checkpoint; returns why not, or "" if it started."""

    def prepare() -> _Work:
        values = {
            "run": _run(host, run).name,
            "checkpoints": tuple(checkpoints or ()) or None,
            "rank": _number(rank),
            "overwrite": bool(replace),
        }
        request = ExportRequest.parse(values, _label)
        return functools.partial(_export, host, request)

    return _start(host, jobs, "export", "the LoRAs", prepare)


def start_deletable_check(host: Host, jobs: Jobs, run: str, threshold: str) -> str:
    """Starts checking which originals could be deleted; returns why not, or "" if it started."""

    def prepare() -> _Work:
        with settings_placed(_label, "threshold"):
            share = parse_share(_entered(threshold) or "99%")
        name = _run(host, run).name
        return functools.partial(_check_deletable, host, name, share or 1.0)

    return _start(host, jobs, "safe", "the check of the originals", prepare)


def start_extraction(
    host: Host,
    jobs: Jobs,
    base: str | None,
    checkpoint: str | None,
    rank: str,
    name: str,
    damaged: bool,
) -> str:
    """Starts making a LoRA from two checkpoints; returns why not, or "" if it started."""

    def prepare() -> _Work:
        values = {
            "base": _file(host, base, "From"),
            "checkpoint": _file(host, checkpoint, "To"),
            "rank": _number(rank),
            "name": _entered(name),
            "damaged": "accept" if damaged else "refuse",
        }
        request = ExtractRequest.parse(values, _label)
        return functools.partial(_extract, host, request)

    return _start(host, jobs, "extract", f"the LoRA from {base} to {checkpoint}", prepare)


def _start(host: Host, jobs: Jobs, panel: Panel, title: str, prepare: Callable[[], _Work]) -> str:
    """Starts what `prepare` returns as a job; returns the refusal, if any."""
    try:
        work = prepare()
        jobs.start(title, functools.partial(turn_task, host, work), host.log, panel)
    except HyperMergeError as error:
        return format_refusal(error)
    return ""


def _fit(host: Host, request: FitRequest, progress: Progress) -> PanelOutcome:
    fit = run_fit(request, host.folders(), progress)
    run = load_run(host.folders(), request.run)
    return PanelOutcome(
        format_fit_result(fit, run),
        tags=fit.tags(run) if fit.differs else "",
        fitted=(run.name, fit.row.name),
        title=host.checkpoint_title(run.hyper_model) or "",
        wrote=bool(fit.topups),
    )


def _extend(host: Host, request: ExtendRequest, progress: Progress) -> str:
    return run_extend(request, host.folders(), progress).place.run


def _restore(host: Host, request: RestoreRequest, progress: Progress) -> PanelOutcome:
    restored = run_restore(request, host.folders(), progress)
    return PanelOutcome(format_restored_checkpoint(restored), wrote=True)


def _export(host: Host, request: ExportRequest, progress: Progress) -> PanelOutcome:
    loras = run_export(request, host.folders(), progress)
    return PanelOutcome(format_exported_loras(loras, request.rank), wrote=True)


def _check_deletable(host: Host, run: str, threshold: float, progress: Progress) -> PanelOutcome:
    report = find_deletable(run, threshold, host.folders(), progress)
    return PanelOutcome(format_deletion_verdicts(report))


def _extract(host: Host, request: ExtractRequest, progress: Progress) -> PanelOutcome:
    lora = run_extract(request, host.folders(), progress)
    return PanelOutcome(format_extracted_lora(lora), wrote=True)


def _run(host: Host, name: str | None) -> Run:
    if not name:
        raise RecipeError("Pick a run", hint="you can make one under Merge.")
    return load_run(host.folders(), name)


def _file(host: Host, name: str | None, label: str) -> Path:
    """Returns the file of a name in the host's list."""
    if not name:
        raise RecipeError(f"{label}: pick a checkpoint.")
    return require_listed_file(name, host.checkpoints())


def _path(host: Host, name: str | None) -> Path | None:
    """Returns the path of a new checkpoint; None for the suggested one."""
    text = _entered(name)
    if text is None:
        return None
    with settings_placed(_label, "name"):
        return host.folders().models / f"{parse_name(text)}.safetensors"


def _shares(text: str) -> dict[str, float]:
    """Returns the sliders' values by checkpoint, without zeros."""
    try:
        shares = {str(name): float(share) for name, share in parse_json(text or "{}").items()}
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise RecipeError("Mix: expected a number for each checkpoint") from None
    shares = {name: share for name, share in shares.items() if share}
    if not shares:
        raise RecipeError("All sliders are at 0, which is the hyper-model itself. Move one.")
    return shares


def _label(key: str) -> str:
    """Returns the panel's label of a setting."""
    return _LABELS.get(key, key)


def _entered(text: str | None) -> str | None:
    """Returns the text that was entered in a field; None if it is empty."""
    return (text or "").strip() or None


def _number(text: str | None) -> object:
    """Returns the number in a field, or its text, which the request refuses; None if it is empty."""
    entered = _entered(text)
    return None if entered is None else plain_value(entered)
