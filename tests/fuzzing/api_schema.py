"""Requests that schemathesis derives from the API's schema, to an API on a folder of tiny files."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import schemathesis
from fastapi import FastAPI
from fault_scenarios import write_sources
from lora_files import share, write_lora
from PIL import Image
from schemathesis.config import CacheConfig, SchemathesisConfig
from schemathesis.engine import events, from_schema
from tiny_family import merge

from hyper_merge.api.routes import build_router
from hyper_merge.hosts.host import GeneratorInfo
from hyper_merge.hosts.job_queue import Job, Jobs
from hyper_merge.hosts.standalone import Standalone
from hyper_merge.operations.compare.compare import ImageGenerator
from hyper_merge.operations.compare.records import ComparisonRecord, save_comparison
from hyper_merge.operations.compare.request import PictureSettings
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import load_run
from hyper_merge.runtime.progress import Progress

_NAMES = {"a": "anime", "b": "photo/portrait", "c": "ink"}  # those of the schema's examples
_LORAS = ("ink", "style/oil")  # likewise
_PATIENCE = 60.0  # seconds in which it must end once it is asked to

# A refusal of a value that has the right type says what to do, which no schema can; it is described.
_REFUSED = ["2xx", "400", "404", "409"]


class GreyHost(Standalone):
    """The app's host, which draws grey pictures at once."""

    def generator_info(self) -> GeneratorInfo:
        return GeneratorInfo(("Euler",))

    @contextmanager
    def drawing(self, task: str) -> Iterator[tuple[Progress, ImageGenerator]]:
        grey = Image.new("RGB", (8, 8))
        yield Progress(), ImageGenerator("Grey", lambda *_: grey, lambda _: "")


class BriefJobs(Jobs):
    """Jobs that end before the next request; those that do not, or fail, are told."""

    def __init__(self, failed: Callable[[str], None], seconds: float) -> None:
        """Makes a queue of jobs that go on by themselves for some seconds."""
        super().__init__()
        self._failed, self._seconds = failed, seconds
        self.outcomes: Counter[str] = Counter()

    def start(self, *arguments, **options) -> Job:
        """Starts a job and waits for its end, or stops it."""
        job = super().start(*arguments, **options)
        job.wait(self._seconds)
        job.stop()
        job.wait(_PATIENCE)
        self.outcomes[job.status.outcome] += 1
        if job.status.outcome in ("running", "failed"):
            self._failed(f"the job {job.status.title!r} {job.status.outcome}: {job.status.message}")
        return job


class ApiTrial:
    """An API on a models folder of its own, and what became of requests to it.

    Attributes:
        requests: How many were sent.
        answers: How many had each status.
        jobs: How their jobs ended.
        failures: Whatever was not as the schema describes it, or an error of status 500.
        slowest: Seconds of the slowest answer, jobs included.
    """

    def __init__(self, root: Path, job_seconds: float) -> None:
        """Writes the files: three checkpoints and a run of two with a comparison, LoRAs and their run.

        Args:
            root: of the models folder, which is made; a copy is kept beside it.
            job_seconds: after which a job is stopped.
        """
        self.requests, self.failures, self.slowest = 0, [], 0.0
        self.answers: Counter[int] = Counter()
        self._root, self._copy = root, root.with_name("copy")
        _write_files(root)
        shutil.copytree(root, self._copy)
        jobs = BriefJobs(self.failures.append, job_seconds)
        self.jobs = jobs.outcomes
        self._app = FastAPI()
        self._app.include_router(build_router(GreyHost(root), jobs))

    def run(self, phases: set[str], examples: int, seed: int = 0) -> None:
        """Sends requests.

        Args:
            phases: of schemathesis: "examples", "coverage", "fuzzing" and "stateful".
            examples: that the last two draw for each route.
            seed: of what is drawn.
        """
        config = SchemathesisConfig(seed=seed, cache=CacheConfig(enabled=False))
        schema = schemathesis.openapi.from_asgi("/openapi.json", self._app, config=config)
        schema.config.generation.max_examples = examples
        schema.config.generation.database = "none"
        schema.config.request_timeout = 2 * _PATIENCE
        schema.config.checks.positive_data_acceptance.expected_statuses = _REFUSED
        for name in ("examples", "coverage", "fuzzing", "stateful"):
            getattr(schema.config.phases, name).enabled = name in phases
        for event in from_schema(schema).execute():
            self._count(event)

    def _count(self, event: events.EngineEvent) -> None:
        if isinstance(event, events.ScenarioFinished):
            self._count_scenario(event.recorder)
            if not (self._root / "hyper-merge/mix/manifest.json").exists():  # deleted by a request
                shutil.copytree(self._copy, self._root, dirs_exist_ok=True)
        elif isinstance(event, events.NonFatalError):
            self.failures.append(f"{event.label}: {event.value}")
        elif isinstance(event, events.FatalError):
            self.failures.append(f"schemathesis itself: {event.exception!r}")

    def _count_scenario(self, recorder) -> None:
        self.requests += len(recorder.interactions)
        for interaction in recorder.interactions.values():
            if interaction.response is None:
                self.failures.append(f"no answer: {interaction.request.uri}")
                continue
            self.answers[interaction.response.status_code] += 1
            self.slowest = max(self.slowest, interaction.response.elapsed)
        for name, checks in recorder.checks.items():
            for check in checks:
                if check.failure_info is not None:
                    case = recorder.cases[name].value
                    self.failures.append(
                        f"{case.operation.label}, {check.name}: {check.failure_info.failure}\n"
                        f"    {case.method} {case.path_parameters} {case.query} {case.body!r:.500}"
                    )


def _write_files(root: Path) -> None:
    write_sources(root)
    folder = root / "Stable-diffusion"
    (folder / "photo").mkdir()
    for old, new in _NAMES.items():
        (folder / f"{old}.safetensors").rename(folder / f"{new}.safetensors")
    (root / "Lora" / "style").mkdir(parents=True)
    loras = [root / "Lora" / f"{name}.safetensors" for name in _LORAS]
    for seed, path in enumerate(loras):
        write_lora(path, seed)
    share(loras, root, name="few", ranks=(2,), iterations=1)
    sources = [folder / f"{_NAMES[name]}.safetensors" for name in "ab"]
    merge(sources, root, ranks=(2, 1), iterations=1)
    run = load_run(Folders.under(root), "mix")
    record = ComparisonRecord(
        "mix",
        "comparison-1",
        "2030",
        "app",
        "mix.safetensors",
        PictureSettings(("x",)),
        {},
        {},
        (),
        (),
    )
    save_comparison(run, record, Image.new("RGB", (8, 8)))
