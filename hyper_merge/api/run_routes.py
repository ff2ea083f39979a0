"""The routes for what is made of runs and checkpoints besides merges, and for deleting a run.

Each but the last starts a job. A run's name is looked up before it starts, files when its turn comes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

from hyper_merge.api.deserialize import (
    parse_absorb,
    parse_average,
    parse_comparison,
    parse_export,
    parse_extraction,
    parse_restore,
    parse_threshold,
    refusals,
)
from hyper_merge.api.request_models import (
    AbsorbBody,
    AverageBody,
    CompareBody,
    ExportBody,
    ExtractBody,
    RestoreBody,
    SafeBody,
)
from hyper_merge.api.response_models import DeletionResponse, JobResponse
from hyper_merge.api.results import (
    Result,
    average_result,
    compare_result,
    export_result,
    extract_result,
    restore_result,
    safe_result,
)
from hyper_merge.api.serialize import job_response
from hyper_merge.errors import HyperMergeError
from hyper_merge.hosts.host import Host
from hyper_merge.hosts.job_queue import JobFunction, Jobs
from hyper_merge.hosts.tasks import compare_task, turn_task
from hyper_merge.operations.deletable import find_deletable
from hyper_merge.operations.export import run_export
from hyper_merge.operations.extend import run_extend
from hyper_merge.operations.extract.extract import run_extract
from hyper_merge.operations.merge.average import run_average
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.operations.restore.restore import run_restore
from hyper_merge.runs.deletion import delete_run
from hyper_merge.runs.fit_records import styles_of
from hyper_merge.runs.lora_runs import load_any_run
from hyper_merge.runs.run import load_run
from hyper_merge.runtime.progress import Progress

_Body = TypeVar("_Body")


class RunRoutes:
    """The functions of the routes; their docstrings are the descriptions in the schema."""

    def __init__(self, host: Host, jobs: Jobs) -> None:
        self._host = host
        self._jobs = jobs

    def average(self, body: AverageBody) -> JobResponse:
        """Starts writing a hyper-model alone; the result has the `file`."""

        def work(progress: Progress) -> Result:
            preflight = run_preflight(parse_average(body, self._host), self._host.folders())
            return average_result(run_average(preflight, progress))

        with refusals():
            parse_average(body, self._host)
            return self._start(f"the average {body.name}", work)

    def absorb(self, body: AbsorbBody) -> JobResponse:
        """Starts a new run with further checkpoints; the run itself stays as it is."""

        def work(progress: Progress) -> str:
            request = parse_absorb(body, self._host)
            return run_extend(request, self._host.folders(), progress).place.run

        return self._start_for(body.run, "{} with further checkpoints", parse_absorb, body, work)

    def restore(self, body: RestoreBody) -> JobResponse:
        """Starts writing a checkpoint of a run, or a mixture; the result has the `file`.

        If its original is there, `explained_in_weights` is the share of its differences in the layers
        that is restored, as a squared norm, and `everything_in_weights` that in all tensors.
        """

        def work(progress: Progress) -> Result:
            request = parse_restore(body, self._host)
            return restore_result(run_restore(request, self._host.folders(), progress))

        return self._start_for(body.run, "a checkpoint of {}", parse_restore, body, work)

    def export(self, body: ExportBody) -> JobResponse:
        """Starts writing one LoRA per checkpoint; the result has the `loras`."""

        def work(progress: Progress) -> Result:
            request = parse_export(body, self._host)
            return export_result(run_export(request, self._host.folders(), progress))

        return self._start_for(body.run, "the LoRAs of {}", parse_export, body, work)

    def extract(self, body: ExtractBody) -> JobResponse:
        """Starts making a LoRA from two checkpoints; the result has its `name` and `explained`."""

        def work(progress: Progress) -> Result:
            request = parse_extraction(body, self._host)
            return extract_result(run_extract(request, self._host.folders(), progress))

        with refusals():
            parse_extraction(body, self._host)
            return self._start(f"the LoRA from {body.base} to {body.checkpoint}", work)

    def safe(self, body: SafeBody) -> JobResponse:
        """Starts checking which originals a run can replace; the result has the `originals`.

        Nothing is deleted.
        """

        def work(progress: Progress) -> Result:
            threshold = parse_threshold(body, self._host)
            return safe_result(find_deletable(body.run, threshold, self._host.folders(), progress))

        return self._start_for(body.run, "the check of {}", parse_threshold, body, work)

    def compare(self, body: CompareBody) -> JobResponse:
        """Starts drawing a comparison; the result has its `name` in the run's folder, and `figures`."""

        def work(task: str, progress: Progress) -> Result:
            request = parse_comparison(body, self._host)
            return compare_result(compare_task(self._host, request, task, progress))

        with refusals():
            self._jobs.require_idle()
            parse_comparison(body, self._host)
            title = f"pictures of {body.run}"
            return job_response(self._jobs.start(title, work, self._host.log))

    def delete(self, name: str) -> DeletionResponse:
        """Deletes a run with its LoRAs, its styles, and its hyper-model if no other run needs that.

        Refused while a job runs, which may need them. No checkpoint or LoRA that the run was made of is
        deleted.
        """
        with refusals():
            self._jobs.require_idle()
            folders = self._host.folders()
            run = load_any_run(folders, name)
            styles = styles_of(run).keys() & self._host.styles().keys()
            gone = delete_run(run, folders)
        self._host.refresh()
        problems = []
        try:
            self._host.remove_styles(styles)
        except HyperMergeError as error:
            problems.append(str(error))
        return DeletionResponse(files=[path.name for path in gone], problems=problems)

    def _start_for(
        self,
        run: str,
        title: str,
        parse: Callable[[_Body, Host], object],
        body: _Body,
        work: Callable[[Progress], object],
    ) -> JobResponse:
        """Starts work on a run, unless the run or the body is refused."""
        with refusals():
            load_run(self._host.folders(), run)
            parse(body, self._host)
            return self._start(title.format(run), work)

    def _start(self, title: str, work: Callable[[Progress], object]) -> JobResponse:
        job: JobFunction = functools.partial(turn_task, self._host, work)
        return job_response(self._jobs.start(title, job, self._host.log))
