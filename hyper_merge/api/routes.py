"""Builds the routes under `/hyper-merge`, for any FastAPI app.

They are plain functions, which FastAPI runs in threads, since they read files. A refusal becomes an
answer with status 400, or 404 for an unknown run or job and 409 while another job runs.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

from hyper_merge.api.deserialize import (
    check_merge,
    parse_fit_request,
    parse_recipe,
    place_merge,
    refusals,
)
from hyper_merge.api.examples import EXAMPLES
from hyper_merge.api.host_routes import HostRoutes
from hyper_merge.api.lora_routes import LoraRoutes
from hyper_merge.api.preset_routes import PresetRoutes
from hyper_merge.api.request_models import FitBody, MergeBody, PlanBody
from hyper_merge.api.response_models import (
    JobResponse,
    JobsResponse,
    PlanResponse,
    RefusalResponse,
    RunResponse,
    RunsResponse,
)
from hyper_merge.api.run_routes import RunRoutes
from hyper_merge.api.serialize import (
    job_response,
    plan_response,
    run_response,
    run_summary_response,
)
from hyper_merge.api.use_routes import UseRoutes
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
from hyper_merge.runs.lora_runs import list_all_runs, load_any_run

PREFIX: Final = "/hyper-merge"

_PROBLEM_FIELDS: Final = ("loc", "msg", "type")  # of a field that is wrong

_REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"model": RefusalResponse, "description": "Refused; says why, and what to do"},
    401: {"model": RefusalResponse, "description": "Name or password is missing or wrong"},
    404: {"model": RefusalResponse, "description": "There is no such run, job or preset"},
    409: {"model": RefusalResponse, "description": "Another job runs"},
}


_RouteRow: TypeAlias = "tuple[str, str, Callable[..., Any], tuple[int, ...], int]"


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
    for method, path, answer, refused, status in _routes(host, jobs):
        example = EXAMPLES[method, path]
        codes = [*refused, *([401] if dependencies else [])]
        router.add_api_route(
            path,
            answer,
            methods=[method],
            status_code=status,
            response_class=JSONResponse if example.answers else Response,
            responses={
                status: _success(example.answers),
                **{code: _REFUSALS[code] for code in codes},
            },
            openapi_extra=_body_example(example.body),
        )
    return router


def _routes(host: Host, jobs: Jobs) -> Iterator[_RouteRow]:
    """Yields method, path, function, codes of refusals, and code of success, of every route."""
    around, merges = HostRoutes(host, jobs), _MergeRoutes(host, jobs)
    runs, use, loras = RunRoutes(host, jobs), UseRoutes(host), LoraRoutes(host, jobs)
    presets = PresetRoutes(host)
    comparison = "/runs/{name}/comparisons/{comparison}"
    yield from (
        ("GET", "/checkpoints", around.checkpoints, (), 200),
        ("POST", "/refresh", around.refresh, (), 200),
        ("POST", "/inspect", around.inspect, (400,), 200),
        ("POST", "/demo", around.demo, (409,), 202),
        ("GET", "/cache", around.cache, (), 200),
        ("DELETE", "/cache", around.clear_cache, (400, 409), 200),
        ("GET", "/presets", presets.presets, (400,), 200),
        ("POST", "/presets", presets.save, (400,), 200),
        ("DELETE", "/presets", presets.delete, (400, 404), 200),
        ("POST", "/plan", merges.plan, (400,), 200),
        ("POST", "/look", merges.look, (400, 409), 202),
        ("POST", "/merge", merges.merge, (400, 409), 202),
        ("POST", "/fit", merges.fit, (400, 404, 409), 202),
        ("POST", "/average", runs.average, (400, 409), 202),
        ("POST", "/absorb", runs.absorb, (400, 404, 409), 202),
        ("POST", "/restore", runs.restore, (400, 404, 409), 202),
        ("POST", "/export", runs.export, (400, 404, 409), 202),
        ("POST", "/extract", runs.extract, (400, 409), 202),
        ("POST", "/safe", runs.safe, (400, 404, 409), 202),
        ("POST", "/compare", runs.compare, (400, 404, 409), 202),
        ("GET", "/loras", loras.loras, (), 200),
        ("POST", "/loras/inspect", loras.inspect, (400,), 200),
        ("POST", "/loras/share", loras.share, (400, 409), 202),
        ("POST", "/loras/resize", loras.resize, (400, 409), 202),
        ("POST", "/loras/combine", loras.combine, (400, 409), 202),
        ("POST", "/loras/add", loras.add, (400, 409), 202),
        ("POST", "/loras/subtract", loras.subtract, (400, 409), 202),
        ("POST", "/loras/fit", loras.fit, (400, 404, 409), 202),
        ("GET", "/jobs", merges.jobs, (), 200),
        ("GET", "/jobs/{job_id}", merges.job, (404,), 200),
        ("POST", "/jobs/{job_id}/cancel", merges.cancel, (404,), 200),
        ("GET", "/runs", merges.runs, (), 200),
        ("GET", "/runs/{name}", merges.run, (400, 404), 200),
        ("DELETE", "/runs/{name}", runs.delete, (400, 404, 409), 200),
        ("POST", "/runs/{name}/mix", use.mix, (400, 404), 200),
        ("POST", "/runs/{name}/styles", use.save_styles, (400, 404), 200),
        ("DELETE", "/runs/{name}/styles", use.remove_styles, (400, 404), 200),
        ("GET", "/runs/{name}/comparisons", use.comparisons, (400, 404), 200),
        ("GET", comparison, use.comparison, (400, 404), 200),
        ("GET", f"{comparison}/picture", use.picture, (400, 404), 200),
    )


def _success(answers: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the schema says of an answer in addition; FastAPI knows the model of a JSON one."""
    if not answers:
        binary = {"type": "string", "format": "binary"}
        return {"description": "The picture", "content": {"image/png": {"schema": binary}}}
    examples = {name: {"value": value} for name, value in answers.items()}
    return {"content": {"application/json": {"examples": examples}}}


def _body_example(body: object) -> dict[str, Any] | None:
    """Returns what the schema says of a body in addition; it is merged into FastAPI's own."""
    if body is None:
        return None
    return {"requestBody": {"content": {"application/json": {"example": body}}}}


class _Route(APIRoute):
    """Answers an invalid request with what is wrong, without the sent values.

    A bare NaN is read as a number, but JSON has no number to answer it with. A method that the path
    lacks is answered with all that it has: Starlette by itself names those of one route.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request of this path."""
        if scope["method"] not in self.methods:
            siblings = (getattr(route, "methods", ()) for route in _routes_of(scope, self.path))
            allowed = ", ".join(sorted(set().union(*siblings)))
            raise HTTPException(405, headers={"Allow": allowed})
        await super().handle(scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wraps the handler; see FastAPI's documentation, "Custom Request and APIRoute class"."""
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(_JSONRequest(request.scope, request.receive))
            except RequestValidationError as error:
                problems = [
                    {name: problem[name] for name in _PROBLEM_FIELDS} for problem in error.errors()
                ]
                raise HTTPException(422, problems) from error

        return handled


class _JSONRequest(Request):
    """A request in whose body 4.0 is the whole number 4, as JSON and its schemas have it."""

    async def json(self) -> Any:
        """Returns the content of the body."""
        return json.loads(await self.body(), parse_float=_parse_float)


def _parse_float(text: str) -> float | int:
    number = float(text)
    return int(number) if number.is_integer() else number


def _routes_of(scope: Scope, path: str) -> list[BaseRoute]:
    """Returns all routes of an app that have a path."""
    return [route for route in scope["app"].routes if getattr(route, "path", None) == path]


class _MergeRoutes:
    """The functions of the routes; their docstrings are the descriptions in the schema."""

    def __init__(self, host: Host, jobs: Jobs) -> None:
        self._host = host
        self._jobs = jobs

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
        """Returns earlier merges, and runs of LoRAs, the newest first."""
        runs, problems = list_all_runs(self._host.folders())
        return RunsResponse(runs=[run_summary_response(run) for run in runs], problems=problems)

    def run(self, name: str) -> RunResponse:
        """Returns one run with its report, its prompts and the checkpoints that were fitted later."""
        with refusals():
            return run_response(load_any_run(self._host.folders(), name), self._host)

    def _require_job(self, job_id: str) -> Job:
        for job in self._jobs.known:
            if job.id == job_id:
                return job
        raise HTTPException(404, f"expected the id of a job of this process, got {job_id!r:.80}")
