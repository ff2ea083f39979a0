"""The cache among the earlier runs: what it holds, and when it may be cleared."""

import threading

import pytest

from hyper_merge.hosts.job_queue import Jobs
from hyper_merge.hosts.standalone import Standalone
from hyper_merge.ui.handlers import history


@pytest.fixture
def host(tmp_path):
    return Standalone(tmp_path)


@pytest.fixture
def analysis(host):
    """A file of the cache of analyses."""
    path = host.folders().cache / "0123-8.analysis.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(3_000_000))
    return path


def log(error):
    raise error


def test_clearing_the_cache_reports_the_freed_space(host, analysis):
    assert (
        "The cache holds 3 MB of at most 20.00 GB."
        in history.list_earlier_runs(host, None, None)[3]
    )
    assert "The cache is empty; 3 MB are free again." in history.clear_idle_cache(host, Jobs())
    assert not analysis.exists()
    assert (
        "The cache holds 0 kB of at most 20.00 GB."
        in history.list_earlier_runs(host, None, None)[3]
    )


def test_the_cache_is_not_cleared_while_a_merge_runs(host, analysis):
    jobs, merged = Jobs(), threading.Event()

    def work(task, progress):
        merged.wait(60)
        return "mix"

    job = jobs.start("mix", work, log)
    try:
        refused = history.clear_idle_cache(host, jobs)
        assert "hm-bad" in refused
        assert "mix is still being made (0%); wait for it, or stop it" in refused
        assert analysis.exists()
    finally:
        merged.set()
    while job.status.outcome == "running":
        job.wait(1)
    assert "are free again" in history.clear_idle_cache(host, jobs)
    assert not analysis.exists()
