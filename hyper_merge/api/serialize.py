"""From what we know to what a client gets; files by their names alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from hyper_merge.api import response_models as answers
from hyper_merge.hosts.host import Host
from hyper_merge.hosts.job_queue import Job
from hyper_merge.loras.prompt_tags import lora_names
from hyper_merge.operations.inspect import checkpoint_size, inspect_files
from hyper_merge.operations.merge.estimate import estimate_merge
from hyper_merge.operations.merge.plan import ForecastCurve
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.runs.fit_records import FitRecord, load_fits
from hyper_merge.runs.folders import Place
from hyper_merge.runs.report import CheckpointReport, Report
from hyper_merge.runs.run import Run

_ELSEWHERE: Final = {"name", "loras", "companions", "checkpoints", "groups"}
"""Of a report, what a run's answer has in another place or another form."""


def checkpoints(host: Host) -> answers.CheckpointsResponse:
    """The host's list."""
    rows = [
        answers.CheckpointResponse(
            name=name, short_hash=host.known_hash(name), size=checkpoint_size(path)
        )
        for name, path in host.checkpoints().items()
    ]
    return answers.CheckpointsResponse(checkpoints=rows)


def look(name: str, path: Path, host: Host) -> answers.InspectedFileResponse:
    """What a listed checkpoint is."""
    row = inspect_files(path)
    return answers.InspectedFileResponse(
        name=name,
        family=row.family,
        size=row.size,
        dtype=row.dtype,
        short_hash=host.known_hash(name),
        legacy_hash=row.legacy_hash,
        vae=row.vae,
        problem=row.problem,
    )


def plan(preflight: Preflight, place: Place, found: ForecastCurve | None) -> answers.PlanResponse:
    """What a merge would write and take.

    Args:
        preflight: the examined recipe.
        place: where its files go.
        found: what could be had, where the files have been looked at.
    """
    recipe, estimate = preflight.recipe, estimate_merge(preflight)
    asked = found.requested_size(preflight) if found else None
    size = place.hyper_model.stat().st_size if place.exists else estimate.average
    return answers.PlanResponse(
        name=place.run,
        family=preflight.inputs.layout.family.title,
        hyper_model=answers.HyperModelResponse(
            name=place.hyper_model.name, exists=place.exists, size=size
        ),
        loras=[] if recipe.finds_ranks else list(lora_names(place.run, recipe.ranks)),
        loras_size=asked if recipe.target is not None else recipe.budget or estimate.loras,
        seconds=estimate.seconds,
        memory=estimate.memory,
        disk=estimate.disk,
        warnings=list(preflight.warnings),
        expected=_expected(found, asked) if found and asked else None,
    )


def job(known: Job) -> answers.JobResponse:
    """How far a job is."""
    now = known.standing
    return answers.JobResponse(
        id=known.id,
        title=now.title,
        outcome=now.outcome,
        phase=now.phase,
        fraction=now.fraction,
        seconds=now.elapsed,
        seconds_left=now.seconds_left if now.outcome == "running" else None,
        stopping=now.stopping,
        message=now.message,
        warnings=list(now.notes),
        run=now.result if isinstance(now.result, str) and now.result else None,
    )


def summary(run: Run) -> answers.RunSummaryResponse:
    """A run in one line."""
    rows = run.report.checkpoints
    return answers.RunSummaryResponse(
        name=run.name,
        created=run.created,
        family=run.family,
        checkpoints=[row.name for row in rows],
        ranks=list(run.recipe.ranks),
        explained=1 - run.report.loss,
        explained_worst=min(row.explained for row in rows),
        missing=[path.name for path in run.missing],
    )


def run(found: Run, host: Host) -> answers.RunResponse:
    """A run with all that is known of it."""
    fits, problems = load_fits(found)
    report = found.report
    return answers.RunResponse(
        name=found.name,
        created=found.created,
        family=found.family,
        hyper_model=found.hyper_model.name,
        hyper_model_title=host.checkpoint_title(found.hyper_model),
        loras=list(report.loras),
        companions=list(report.companions),
        missing=[path.name for path in found.missing],
        settings=found.recipe.to_metadata(),
        checkpoints=[
            answers.RunCheckpointResponse(**_row(row, report.tags(row)))
            for row in report.checkpoints
        ],
        report=_report(report),
        fits=[_fit(fitted, found) for fitted in fits],
        problems=[*found.problems, *problems],
    )


def _expected(found: ForecastCurve, size: int) -> list[answers.ExpectedResponse]:
    pairs = zip(found.names, found.at(size), strict=True)
    return [answers.ExpectedResponse(name=name, explained=share) for name, share in pairs]


def _row(row: CheckpointReport, prompt: str) -> dict[str, Any]:
    figures = asdict(row)
    topup = figures.pop("topup")
    return {**figures, "prompt": prompt, "topups": [topup] if topup else []}


def _fit(fitted: FitRecord, found: Run) -> answers.FitResponse:
    figures = _row(fitted.row, fitted.tags(found))
    return answers.FitResponse(
        **{**figures, "topups": [each.name for each in fitted.topups]},
        explained_with_topups=fitted.explained,
        created=fitted.created,
    )


def _report(report: Report) -> answers.ReportResponse:
    names = [row.name for row in report.checkpoints]
    figures = {name: value for name, value in asdict(report).items() if name not in _ELSEWHERE}
    groups = [[names[place] for place in group] for group in report.groups]
    return answers.ReportResponse(**figures, groups=groups)
