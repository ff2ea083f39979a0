"""The routes for LoRAs as input: their list, and jobs that share, resize, combine, add and fit them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hyper_merge.api.deserialize import find_file, refusals
from hyper_merge.api.lora_models import (
    ApplyLorasBody,
    CombineLorasBody,
    FitLoraBody,
    InspectedLoraResponse,
    InspectedLorasResponse,
    InspectLorasBody,
    LoraResponse,
    LorasResponse,
    ResizeLoraBody,
    ShareLorasBody,
)
from hyper_merge.api.lora_requests import (
    parse_add,
    parse_combine,
    parse_lora_fit,
    parse_resize,
    parse_share,
    parse_subtract,
)
from hyper_merge.api.response_models import JobResponse
from hyper_merge.api.results import Result, apply_result, combine_result
from hyper_merge.api.serialize import job_response
from hyper_merge.hosts.host import Host
from hyper_merge.hosts.job_queue import JobFunction, Jobs
from hyper_merge.hosts.tasks import turn_task
from hyper_merge.operations.inspect import checkpoint_size
from hyper_merge.operations.loras.apply import run_apply
from hyper_merge.operations.loras.combine import run_combine
from hyper_merge.operations.loras.fit import run_lora_fit
from hyper_merge.operations.loras.inspect import inspect_lora
from hyper_merge.operations.loras.request import ApplyRequest, CombineRequest
from hyper_merge.operations.loras.share import share_loras
from hyper_merge.runs.lora_runs import load_lora_run
from hyper_merge.runtime.progress import Progress

_Body = TypeVar("_Body")


class LoraRoutes:
    """The functions of the routes; their docstrings are the descriptions in the schema."""

    def __init__(self, host: Host, jobs: Jobs) -> None:
        self._host = host
        self._jobs = jobs

    def loras(self) -> LorasResponse:
        """Returns the host's list of LoRAs, whose names the requests for LoRAs use."""
        listed = self._host.loras().items()
        return LorasResponse(
            loras=[LoraResponse(name=name, size=checkpoint_size(path)) for name, path in listed]
        )

    def inspect(self, body: InspectLorasBody) -> InspectedLorasResponse:
        """Returns family and rank of LoRAs, and why one cannot be used."""
        with refusals():
            listed = self._host.loras()
            files = [(name, find_file(name, "loras", listed)) for name in body.loras]
            return InspectedLorasResponse(loras=[_inspected(*file) for file in files])

    def share(self, body: ShareLorasBody) -> JobResponse:
        """Starts making a few shared LoRAs of many; its job names the run."""

        def work(progress: Progress) -> str:
            recipe = parse_share(body, self._host)
            return share_loras(recipe, self._host.folders(), progress).report.name

        with refusals():
            recipe = parse_share(body, self._host)
            return self._start(recipe.name, work)

    def resize(self, body: ResizeLoraBody) -> JobResponse:
        """Starts making a LoRA smaller; the result has its `name`, `size` and what it `kept`."""
        return self._combination(body, parse_resize)

    def combine(self, body: CombineLorasBody) -> JobResponse:
        """Starts adding LoRAs up to one; the result has its `name`, `size` and what it `kept`."""
        return self._combination(body, parse_combine)

    def add(self, body: ApplyLorasBody) -> JobResponse:
        """Starts writing a checkpoint with LoRAs added to it; the result has the `file`."""
        return self._application(body, parse_add, f"{body.checkpoint} with LoRAs")

    def subtract(self, body: ApplyLorasBody) -> JobResponse:
        """Starts writing a checkpoint with LoRAs taken away from it; the result has the `file`."""
        return self._application(body, parse_subtract, f"{body.checkpoint} without LoRAs")

    def fit(self, body: FitLoraBody) -> JobResponse:
        """Starts fitting a LoRA onto the shared ones of a run; the run's answer has its prompt then."""

        def work(progress: Progress) -> str:
            request = parse_lora_fit(body, self._host)
            return run_lora_fit(request, self._host.folders(), progress).run

        with refusals():
            load_lora_run(self._host.folders(), body.run)
            parse_lora_fit(body, self._host)
            return self._start(f"the fit of {body.lora} onto {body.run}", work)

    def _combination(
        self, body: _Body, parse: Callable[[_Body, Host], CombineRequest]
    ) -> JobResponse:
        def work(progress: Progress) -> Result:
            return combine_result(run_combine(parse(body, self._host), progress))

        with refusals():
            return self._start(parse(body, self._host).path.stem, work)

    def _application(
        self,
        body: ApplyLorasBody,
        parse: Callable[[ApplyLorasBody, Host], ApplyRequest],
        title: str,
    ) -> JobResponse:
        def work(progress: Progress) -> Result:
            return apply_result(run_apply(parse(body, self._host), progress))

        with refusals():
            parse(body, self._host)
            return self._start(title, work)

    def _start(self, title: str, work: Callable[[Progress], Any]) -> JobResponse:
        job: JobFunction = functools.partial(turn_task, self._host, work)
        return job_response(self._jobs.start(title, job, self._host.log))


def _inspected(name: str, path: Path) -> InspectedLoraResponse:
    lora = inspect_lora(path)
    return InspectedLoraResponse(
        name=name, family=lora.family, rank=lora.rank, problem=lora.problem or None
    )
