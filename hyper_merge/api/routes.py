"""Builds the routes under `/hyper-merge`, for any FastAPI app.

They are plain functions, which FastAPI runs in threads, since they read files. A refusal becomes an
answer with status 400, or 404 for an unknown run or job and 409 while another job runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from hyper_merge.api.deserialize import (
    check_merge,
    find_file,
    parse_fit_request,
    parse_recipe,
    place_merge,
    refusals,
)
from hyper_merge.api.request_models import FitBody, InspectBody, MergeBody, PlanBody
from hyper_merge.api.response_models import (
    CheckpointsResponse,
    InspectionResponse,
    JobResponse,
    JobsResponse,
    PlanResponse,
    RefusalResponse,
    RunResponse,
    RunsResponse,
)
from hyper_merge.api.run_routes import RunRoutes
from hyper_merge.api.serialize import (
    checkpoints_response,
    inspected_response,
    job_response,
    plan_response,
    run_response,
    run_summary_response,
)
from hyper_merge.hosts.host import Host
from hyper_merge.hosts.job_queue import Job, Jobs
from hyper_merge.hosts.tasks import (
    FORECAST_TITLE,
    fit_task,
    forecast_task,
    known_forecast,
    merge_task,
)
from hyper_merge.operations.fit.fit import prepare_fit
from hyper_merge.runs.run import list_runs, load_run

PREFIX: Final = "/hyper-merge"

_PROBLEM_FIELDS: Final = ("loc", "msg", "type")  # of a field that is wrong

_REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"model": RefusalResponse, "description": "Refused; says why, and what to do"},
    401: {"model": RefusalResponse, "description": "Name or password is missing or wrong"},
    404: {"model": RefusalResponse, "description": "There is no such run or job"},
    409: {"model": RefusalResponse, "description": "Another job runs"},
}


def build_router(host: Host, jobs: Jobs, dependencies: Sequence[Any] = ()) -> APIRouter:
    """Returns all routes.

    Args:
        host: the host with the checkpoints and folders.
        jobs: the jobs of the process, which the tab shows too.
        dependencies: of every route, such as its authentication.
    """
    router = APIRouter(
        prefix=PREFIX,
        tags=["Hyper-Merge"],
        dependencies=list(dependencies),
        route_class=_Route,
    )
    routes, run_routes = _Routes(host, jobs), RunRoutes(host, jobs)
    for method, path, answer, refused, status in (
        ("GET", "/checkpoints", routes.checkpoints, (), 200),
        ("POST", "/inspect", routes.inspect, (400,), 200),
        ("POST", "/plan", routes.plan, (400,), 200),
        ("POST", "/look", routes.look, (400, 409), 202),
        ("POST", "/merge", routes.merge, (400, 409), 202),
        ("POST", "/fit", routes.fit, (400, 404, 409), 202),
        ("POST", "/average", run_routes.average, (400, 409), 202),
        ("POST", "/absorb", run_routes.absorb, (400, 404, 409), 202),
        ("POST", "/restore", run_routes.restore, (400, 404, 409), 202),
        ("POST", "/export", run_routes.export, (400, 404, 409), 202),
        ("POST", "/extract", run_routes.extract, (400, 409), 202),
        ("POST", "/safe", run_routes.safe, (400, 404, 409), 202),
        ("POST", "/compare", run_routes.compare, (400, 404, 409), 202),
        ("GET", "/jobs", routes.jobs, (), 200),
        ("GET", "/jobs/{job_id}", routes.job, (404,), 200),
        ("POST", "/jobs/{job_id}/cancel", routes.cancel, (404,), 200),
        ("GET", "/runs", routes.runs, (), 200),
        ("GET", "/runs/{name}", routes.run, (400, 404), 200),
        ("DELETE", "/runs/{name}", run_routes.delete, (400, 404, 409), 200),
    ):
        codes = [*refused, *([401] if dependencies else [])]
        router.add_api_route(
            path,
            answer,
            methods=[method],
            status_code=status,
            responses={code: _REFUSALS[code] for code in codes},
        )
    return router


class _Route(APIRoute):
    """Answers an invalid request with the invalid fields and the reasons, without the sent values.

    A bare NaN is read as a number, but JSON has no number to answer it with.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wraps the handler; see FastAPI's documentation, "Custom Request and APIRoute class"."""
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                problems = [
                    {name: problem[name] for name in _PROBLEM_FIELDS} for problem in error.errors()
                ]
                raise HTTPException(422, problems) from error

        return handled


class _Routes:
    """The functions of the routes; their docstrings are the descriptions in the schema."""

    def __init__(self, host: Host, jobs: Jobs) -> None:
        self._host = host
        self._jobs = jobs

    def checkpoints(self) -> CheckpointsResponse:
        """Returns the host's list of checkpoints, whose names all other requests use."""
        return checkpoints_response(self._host)

    def inspect(self, body: InspectBody) -> InspectionResponse:
        """Returns family, type, hash and VAE of checkpoints, and why one cannot be merged."""
        with refusals():
            listed = self._host.checkpoints()
            files = [(name, find_file(name, "checkpoints", listed)) for name in body.checkpoints]
            return InspectionResponse(
                checkpoints=[inspected_response(name, path, self._host) for name, path in files]
            )

    def plan(self, body: PlanBody) -> PlanResponse:
        """Returns the files, time and memory of a merge, or why it cannot be made; writes nothing."""
        with refusals():
            preflight, place = place_merge(body, self._host)
            return plan_response(preflight, place, known_forecast(preflight))

    def look(self, body: PlanBody) -> JobResponse:
        """Starts an analysis of the checkpoints, after which their plan forecasts the explained shares.

        It writes only to the cache, which a merge of them uses again.
        """
        with refusals():
            self._jobs.require_idle()
            check_merge(body, self._host)
            preflight = functools.partial(check_merge, body, self._host)
            work = functools.partial(forecast_task, self._host, preflight)
            return job_response(self._jobs.start(FORECAST_TITLE, work, self._host.log))

    def merge(self, body: MergeBody) -> JobResponse:
        """Starts a merge, or says why it cannot be made; its job shows the progress."""
        with refusals():
            self._jobs.require_idle()
            preflight, place = place_merge(body, self._host)
            name = preflight.recipe.name
            recipe = functools.partial(parse_recipe, body, name, self._host)
            work = functools.partial(merge_task, self._host, recipe, body.save_styles)
            return job_response(self._jobs.start(place.run, work, self._host.log))

    def fit(self, body: FitBody) -> JobResponse:
        """Starts fitting a checkpoint onto the LoRAs of a run; its job shows the progress."""
        with refusals():
            self._jobs.require_idle()
            fit = prepare_fit(parse_fit_request(body, self._host), self._host.folders())
            request = functools.partial(parse_fit_request, body, self._host)
            work = functools.partial(fit_task, self._host, request, body.save_styles)
            title = f"the fit of {fit.name} onto {fit.run.name}"
            return job_response(self._jobs.start(title, work, self._host.log))

    def jobs(self) -> JobsResponse:
        """Returns the last jobs of this process, including those of the tab, the newest first."""
        return JobsResponse(jobs=[job_response(job) for job in self._jobs.known])

    def job(self, job_id: str) -> JobResponse:
        """Returns the progress of a job, or how it ended."""
        return job_response(self._require_job(job_id))

    def cancel(self, job_id: str) -> JobResponse:
        """Asks a job to end; it leaves nothing half-written. One that has ended stays as it is."""
        job = self._require_job(job_id)
        if job.status.outcome == "running":
            job.stop()
        return job_response(job)

    def runs(self) -> RunsResponse:
        """Returns earlier merges, the newest first."""
        runs, problems = list_runs(self._host.folders())
        return RunsResponse(runs=[run_summary_response(run) for run in runs], problems=problems)

    def run(self, name: str) -> RunResponse:
        """Returns one run with its report, its prompts and the checkpoints that were fitted later."""
        with refusals():
            return run_response(load_run(self._host.folders(), name), self._host)

    def _require_job(self, job_id: str) -> Job:
        for job in self._jobs.known:
            if job.id == job_id:
                return job
        raise HTTPException(404, f"expected the id of a job of this process, got {job_id!r:.80}")
