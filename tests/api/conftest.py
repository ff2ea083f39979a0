"""A client of the API on a models folder with three tiny checkpoints."""

import shutil
import threading
import time
import warnings

import pytest
from fastapi import FastAPI

from hyper_merge.api.routes import build_router
from hyper_merge.errors import InterruptedRun
from hyper_merge.hosts import tasks
from hyper_merge.hosts.job_queue import Jobs
from hyper_merge.hosts.standalone import Standalone

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # starlette's own, of a name that anyio has given up
    from fastapi.testclient import TestClient


@pytest.fixture
def root(tmp_path, files):
    """The models folder; its files may be changed."""
    folder = tmp_path / "models"
    (folder / "Stable-diffusion" / "sub").mkdir(parents=True)
    for path, name in zip(files, ("a", "b", "sub/c"), strict=True):
        shutil.copy2(path, folder / "Stable-diffusion" / f"{name}.safetensors")
    return folder


@pytest.fixture
def run(root, merged):
    """The name of a merge that was made some time ago in the models folder."""
    shutil.copytree(merged.place.loras.parent, root, dirs_exist_ok=True)
    return "mix"


@pytest.fixture
def host(root):
    return Standalone(root)


@pytest.fixture
def jobs():
    """A queue of jobs; none is left running."""
    jobs = Jobs()
    yield jobs
    for job in jobs.known:
        job.stop()
    for thread in threading.enumerate():
        if thread.name == "hyper-merge":
            thread.join(60)


class Current:
    """Stands for what the test at hand has: to build the routes takes longer than most tests."""

    def __init__(self):
        self.of_test = None

    def __getattr__(self, name):
        return getattr(self.of_test, name)


@pytest.fixture(scope="session")
def app_of():
    """Returns an app for a host and jobs, the same one by the same dependencies."""
    apps = {}

    def app_of(host, jobs, *dependencies):
        if dependencies not in apps:
            places, app = (Current(), Current()), FastAPI()
            app.include_router(build_router(*places, dependencies))
            apps[dependencies] = app, *places
        app, *places = apps[dependencies]
        for place, thing in zip(places, (host, jobs), strict=True):
            place.of_test = thing
        return app

    return app_of


@pytest.fixture
def app(app_of, host, jobs):
    return app_of(host, jobs)


@pytest.fixture
def client(app):
    return Client(TestClient(app))


@pytest.fixture
def open_client():
    """Returns a function that makes a client of another app."""
    return lambda app, **options: Client(TestClient(app, **options))


@pytest.fixture
def endless(monkeypatch):
    """Merges that go on until they are stopped."""
    over = threading.Event()

    def run_merge(preflight, progress):
        while not over.is_set():  # where a test failed before it stopped the merge
            progress.report("reading the checkpoints", 0.25)
            time.sleep(0.002)
        raise InterruptedRun("stopped; no file was changed")

    monkeypatch.setattr(tasks, "run_merge", run_merge)
    yield
    over.set()


class Client:
    """Asks the API, and returns the status and the content of its answers."""

    def __init__(self, client):
        self.http = client

    def get(self, path, **options):
        answer = self.http.get(f"/hyper-merge{path}", **options)
        return answer.status_code, answer.json()

    def post(self, path, body=None, **options):
        answer = self.http.post(f"/hyper-merge{path}", json=body, **options)
        return answer.status_code, answer.json()

    def ended(self, job):
        """Returns a job as it ended, once it has."""
        deadline = time.monotonic() + 60
        while job["outcome"] == "running":
            assert time.monotonic() < deadline, job
            time.sleep(0.02)
            code, job = self.get(f"/jobs/{job['id']}")
            assert code == 200
        return job
