"""Makes the answers of the API; files are named without their folders."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal

from hyper_merge.api.report_models import ReportResponse
from hyper_merge.api.response_models import (
    CheckpointResponse,
    CheckpointsResponse,
    ExpectedResponse,
    FitResponse,
    ForecastResponse,
    HyperModelResponse,
    InspectedFileResponse,
    JobResponse,
    PlanResponse,
    RunCheckpointResponse,
    RunResponse,
    RunSummaryResponse,
)
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
"""The fields of a report that a run's answer has in another place or another form."""


def checkpoints_response(host: Host) -> CheckpointsResponse:
    """Returns the host's list."""
    rows = [
        CheckpointResponse(name=name, short_hash=host.known_hash(name), size=checkpoint_size(path))
        for name, path in host.checkpoints().items()
    ]
    return CheckpointsResponse(checkpoints=rows)


def inspected_response(name: str, path: Path, host: Host) -> InspectedFileResponse:
    """Returns a checkpoint of the list as its header describes it."""
    row = inspect_files(path)
    return InspectedFileResponse(
        name=name,
        family=row.family,
        size=row.size,
        dtype=row.dtype,
        short_hash=host.known_hash(name),
        legacy_hash=row.legacy_hash,
        vae=row.vae,
        problem=row.problem,
    )


def plan_response(
    preflight: Preflight, place: Place, forecast: ForecastCurve | None
) -> PlanResponse:
    """Returns the files, time and memory that a merge would take.

    Args:
        preflight: the checked recipe.
        place: where its files go.
        forecast: known where the files have been analyzed, else None.
    """
    recipe, estimate = preflight.recipe, estimate_merge(preflight)
    loras_size = forecast.requested_size(preflight) if forecast else None
    size = place.size_of_hyper_model(estimate.average)
    return PlanResponse(
        name=place.run,
        family=preflight.inputs.layout.family.title,
        hyper_model=HyperModelResponse(name=place.hyper_model.name, exists=place.exists, size=size),
        loras=[] if recipe.finds_ranks else list(lora_names(place.run, recipe.ranks)),
        loras_size=loras_size if recipe.target is not None else recipe.budget or estimate.loras,
        seconds=estimate.seconds,
        training=preflight.rounds,
        memory=estimate.memory,
        disk=estimate.disk,
        warnings=list(preflight.warnings),
        expected=_expected(forecast, loras_size) if forecast and loras_size else None,
        curve=_curve(forecast) if forecast else None,
    )


def job_response(job: Job) -> JobResponse:
    """Returns the progress of a job."""
    status = job.status
    return JobResponse(
        id=job.id,
        title=status.title,
        outcome=status.outcome,
        phase=status.phase,
        fraction=1.0 if status.outcome == "done" else status.fraction,
        seconds=status.elapsed,
        seconds_left=status.seconds_left if status.outcome == "running" else None,
        stopping=status.stopping,
        message=status.message,
        warnings=list(status.notes),
        run=status.result if isinstance(status.result, str) and status.result else None,
        result=status.result if isinstance(status.result, dict) else None,
    )


def run_summary_response(run: Run) -> RunSummaryResponse:
    """Returns a summary of a run."""
    rows = run.report.checkpoints
    return RunSummaryResponse(
        name=run.name,
        kind=_kind(run),
        created=run.created,
        family=run.family,
        checkpoints=[row.name for row in rows],
        ranks=list(run.recipe.ranks),
        explained=run.report.fidelity_mean,
        explained_worst=run.report.worst.fidelity,
        missing=[path.name for path in run.missing],
    )


def run_response(run: Run, host: Host) -> RunResponse:
    """Returns a run with its report and its fits."""
    fits, problems = load_fits(run)
    report = run.report
    return RunResponse(
        name=run.name,
        kind=_kind(run),
        created=run.created,
        family=run.family,
        hyper_model=run.hyper_model.name,
        hyper_model_title=None if run.of_loras else host.checkpoint_title(run.hyper_model),
        loras=list(report.loras),
        companions=list(report.companions),
        missing=[path.name for path in run.missing],
        settings=run.recipe.to_metadata(),
        checkpoints=[
            RunCheckpointResponse(**_checkpoint_fields(row, report.tags(row)))
            for row in report.checkpoints
        ],
        report=_report_response(report),
        fits=[_fit_response(fit, run) for fit in fits],
        problems=[*run.problems, *problems],
    )


def _kind(run: Run) -> Literal["checkpoints", "loras"]:
    return "loras" if run.of_loras else "checkpoints"


def _expected(forecast: ForecastCurve, size: int) -> list[ExpectedResponse]:
    pairs = zip(forecast.names, forecast.at(size), strict=True)
    return [ExpectedResponse(name=name, explained=share) for name, share in pairs]


def _curve(forecast: ForecastCurve) -> list[ForecastResponse]:
    return [
        ForecastResponse(
            size=size,
            ranks=list(ranks),
            explained=sum(shares) / len(shares),
            explained_worst=min(shares),
        )
        for size, ranks, shares in zip(forecast.sizes, forecast.ranks, forecast.shared, strict=True)
    ]


def _checkpoint_fields(row: CheckpointReport, prompt: str) -> dict[str, Any]:
    fields = asdict(row)
    topup, in_weights = fields.pop("topup"), fields.pop("explained")
    del fields["explained_weighted"]  # 0 where it is not known
    fields |= {"explained": row.fidelity, "explained_in_weights": in_weights}
    return {**fields, "prompt": prompt, "topups": [topup] if topup else []}


def _fit_response(fit: FitRecord, run: Run) -> FitResponse:
    fields = _checkpoint_fields(fit.row, fit.tags(run))
    return FitResponse(
        **{**fields, "topups": [topup.name for topup in fit.topups]},
        explained_with_topups=fit.fidelity,
        created=fit.created,
    )


def _report_response(report: Report) -> ReportResponse:
    names = [row.name for row in report.checkpoints]
    fields = {name: value for name, value in asdict(report).items() if name not in _ELSEWHERE}
    groups = [[names[place] for place in group] for group in report.groups]
    return ReportResponse(**fields, groups=groups)
