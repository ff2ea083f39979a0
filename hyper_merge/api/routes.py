"""The routes under `/hyper-merge`, for any FastAPI app; what they do is done elsewhere.

Plain functions, which FastAPI runs in threads: files are read here. A refusal of ours becomes an
answer of 400, or of 404 for an unknown run or job and 409 while another job runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from hyper_merge.api import deserialize as asking
from hyper_merge.api import response_models as answers
from hyper_merge.api import serialize as answering
from hyper_merge.api.request_models import FitBody, InspectBody, MergeBody, PlanBody
from hyper_merge.errors import HyperMergeError, UnknownRunError
from hyper_merge.hosts import job_queue as work
from hyper_merge.hosts import tasks as working
from hyper_merge.hosts.host import Host
from hyper_merge.operations.fit.fit import prepare_fit as prepared_fit
from hyper_merge.runs.run import list_runs, load_run

PREFIX: Final = "/hyper-merge"

_TOLD: Final = ("loc", "msg", "type")  # of a field that is wrong

_REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"model": answers.RefusalResponse, "description": "Refused; says why, and what to do"},
    401: {"model": answers.RefusalResponse, "description": "Name or password is missing or wrong"},
    404: {"model": answers.RefusalResponse, "description": "There is no such run or job"},
    409: {"model": answers.RefusalResponse, "description": "Another job runs"},
}


def build_router(host: Host, jobs: work.Jobs, dependencies: Sequence[Any] = ()) -> APIRouter:
    """All routes.

    Args:
        host: whose checkpoints and folders are meant.
        jobs: those of the process, which the tab shows too.
        dependencies: of every route, such as its authentication.
    """
    router = APIRouter(
        prefix=PREFIX,
        tags=["Hyper-Merge"],
        dependencies=list(dependencies),
        route_class=_Route,
    )
    routes = _Routes(host, jobs)
    for method, path, answer, refusals, status in (
        ("GET", "/checkpoints", routes.checkpoints, (), 200),
        ("POST", "/inspect", routes.inspect, (400,), 200),
        ("POST", "/plan", routes.plan, (400,), 200),
        ("POST", "/look", routes.look, (400, 409), 202),
        ("POST", "/merge", routes.merge, (400, 409), 202),
        ("POST", "/fit", routes.fit, (400, 404, 409), 202),
        ("GET", "/jobs", routes.jobs, (), 200),
        ("GET", "/jobs/{job_id}", routes.job, (404,), 200),
        ("POST", "/jobs/{job_id}/cancel", routes.cancel, (404,), 200),
        ("GET", "/runs", routes.runs, (), 200),
        ("GET", "/runs/{name}", routes.run, (400, 404), 200),
    ):
        codes = [*refusals, *([401] if dependencies else [])]
        router.add_api_route(
            path,
            answer,
            methods=[method],
            status_code=status,
            responses={code: _REFUSALS[code] for code in codes},
        )
    return router


class _Route(APIRoute):
    """Says of a request which field is wrong and why, but not what was sent.

    A bare NaN is read as a number, but there is none in JSON to say it back with.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Source: FastAPI's documentation, "Custom Request and APIRoute class"."""
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                told = [{name: each[name] for name in _TOLD} for each in error.errors()]
                raise HTTPException(422, told) from error

        return handled


class _Routes:
    """What each route answers; its docstring is its description in the schema."""

    def __init__(self, host: Host, jobs: work.Jobs) -> None:
        self._host = host
        self._jobs = jobs

    def checkpoints(self) -> answers.CheckpointsResponse:
        """The host's list of checkpoints, whose names all other requests use."""
        return answering.checkpoints(self._host)

    def inspect(self, asked: InspectBody) -> answers.InspectionResponse:
        """What checkpoints are: family, type, hash, VAE, and what keeps them from being merged."""
        with _refusals():
            listed = self._host.checkpoints()
            names = asked.checkpoints
            found = [(name, asking.file_of(name, "checkpoints", listed)) for name in names]
            return answers.InspectionResponse(
                checkpoints=[answering.look(name, path, self._host) for name, path in found]
            )

    def plan(self, asked: PlanBody) -> answers.PlanResponse:
        """What a merge would write and take, or why it cannot be made; nothing is written."""
        with _refusals():
            preflight, place = asking.prepared(asked, self._host)
            found = working.known_forecast(preflight)
            return answering.plan(preflight, place, found)

    def look(self, asked: PlanBody) -> answers.JobResponse:
        """Starts a look at the checkpoints, after which their plan says what would come back of them.

        Writes nothing but the cache, which a merge of them uses again.
        """
        with _refusals():
            self._jobs.require_idle()
            asking.examined(asked, self._host)
            preflight = functools.partial(asking.examined, asked, self._host)
            begin = functools.partial(working.forecast_task, self._host, preflight)
            return answering.job(self._jobs.start(working.FORECAST_TITLE, begin, self._host.log))

    def merge(self, asked: MergeBody) -> answers.JobResponse:
        """Starts a merge, or says why it cannot be made; its job says how far it is."""
        with _refusals():
            self._jobs.require_idle()
            preflight, _ = asking.prepared(asked, self._host)
            name = preflight.recipe.name
            recipe = functools.partial(asking.recipe_of, asked, name, self._host)
            begin = functools.partial(working.merge_task, self._host, recipe, asked.save_styles)
            return answering.job(self._jobs.start(name, begin, self._host.log))

    def fit(self, asked: FitBody) -> answers.JobResponse:
        """Starts placing a checkpoint on the LoRAs of a run; its job says how far it is."""
        with _refusals():
            self._jobs.require_idle()
            job = prepared_fit(asking.order_of(asked, self._host), self._host.folders())
            order = functools.partial(asking.order_of, asked, self._host)
            begin = functools.partial(working.fit_task, self._host, order, asked.save_styles)
            title = f"the fit of {job.name} onto {job.run.name}"
            return answering.job(self._jobs.start(title, begin, self._host.log))

    def jobs(self) -> answers.JobsResponse:
        """The last jobs of this process, those of the tab too, the newest first."""
        return answers.JobsResponse(jobs=[answering.job(known) for known in self._jobs.known])

    def job(self, job_id: str) -> answers.JobResponse:
        """How far a job is, or how it ended."""
        return answering.job(self._known(job_id))

    def cancel(self, job_id: str) -> answers.JobResponse:
        """Asks a job to end; it leaves nothing half-written. One that has ended stays as it is."""
        known = self._known(job_id)
        if known.standing.outcome == "running":
            known.stop()
        return answering.job(known)

    def runs(self) -> answers.RunsResponse:
        """Earlier merges, the newest first."""
        found, problems = list_runs(self._host.folders())
        return answers.RunsResponse(
            runs=[answering.summary(run) for run in found], problems=problems
        )

    def run(self, name: str) -> answers.RunResponse:
        """One run with its report, its prompts and the checkpoints that were fitted later."""
        with _refusals():
            return answering.run(load_run(self._host.folders(), name), self._host)

    def _known(self, job_id: str) -> work.Job:
        for known in self._jobs.known:
            if known.id == job_id:
                return known
        raise HTTPException(404, f"expected the id of a job of this process, got {job_id!r:.80}")


@contextmanager
def _refusals() -> Iterator[None]:
    """Turns our refusals into answers."""
    try:
        yield
    except HyperMergeError as error:
        raise HTTPException(_status(error), str(error)) from error


def _status(error: HyperMergeError) -> int:
    if isinstance(error, work.BusyError):
        return 409
    return 404 if isinstance(error, UnknownRunError) else 400
