"""Workers that are started, and clusters that are there: found, or refused before any work."""

import os
import sys
import time
from contextlib import ExitStack

import pytest
from dask_programs import process, running_scheduler
from local_server import find_free_port
from remote_work import pause

from hyper_merge.cluster import opening
from hyper_merge.cluster.opening import ClusterRequest, open_workers, require_dask
from hyper_merge.errors import ClusterError, InterruptedRun
from hyper_merge.runtime.progress import Progress

for needed in ("distributed", "cryptography"):
    pytest.importorskip(needed, reason="needs the extra cluster")


def say_nothing(_line):
    pass


@pytest.fixture
def scheduler():
    """A scheduler without workers: its address and its process."""
    with running_scheduler() as found:
        yield found


@pytest.mark.parametrize("missing", ["distributed", "cryptography"])
def test_a_machine_without_dask_is_told_what_to_install(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ClusterError, match=rf"{missing}.*pip install 'hyper-merge\[cluster\]'"):
        require_dask()


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:{port}", "10.0.0.1", "nonsense://a:1"])
def test_a_scheduler_that_is_not_there_is_refused_at_once(address):
    address = address.format(port=find_free_port())
    begun = time.monotonic()
    with (
        pytest.raises(
            ClusterError, match=f"no scheduler answers at {address}: .*; give the address"
        ),
        open_workers(ClusterRequest(scheduler=address), Progress(), say_nothing),
    ):
        pass
    assert time.monotonic() - begun < 30


def test_started_workers_have_a_gpu_each_and_an_allocator_that_keeps_memory(monkeypatch):
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    lines = []
    with open_workers(ClusterRequest(3, memory=2**30), Progress(), lines.append) as workers:
        numbers = workers.on_each(os.getenv, "CUDA_VISIBLE_DEVICES")
        threads = workers.on_each(os.getenv, "OMP_NUM_THREADS")
        returned_at_once = workers.on_each(os.getenv, "MALLOC_TRIM_THRESHOLD_")
        limits = [worker.memory for worker in workers.workers]
    assert sorted(numbers.values()) == ["0", "0", "1"]
    assert set(threads.values()) == {"1"}
    assert set(returned_at_once.values()) == {None}
    assert limits == [2**30] * 3
    assert len(lines) == 1
    assert lines[0].startswith("dashboard of the workers: http://127.0.0.1:")


def test_workers_have_the_gpus_that_this_process_sees(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    names = [opening._environment(number)["CUDA_VISIBLE_DEVICES"] for number in range(3)]
    assert names == ["5", "GPU-7", "5"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert opening._environment(0) == {}


def test_a_worker_of_another_version_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("hyper_merge.__version__", "9.9.9")
    with (
        pytest.raises(
            ClusterError,
            match=r"the worker tls://.* has hyper-merge \d.*, and this process 9\.9\.9; install the",
        ),
        open_workers(ClusterRequest(1, memory=2**30), Progress(), say_nothing),
    ):
        pass


def test_a_process_without_the_program_is_refused_by_name():
    error = ModuleNotFoundError("No module named 'hyper_merge'")
    with pytest.raises(ClusterError, match=r"the scheduler does not run hyper-merge \(ModuleNot"):
        opening._require_program("the scheduler", error)


def test_a_cluster_without_workers_is_waited_for_and_refused(scheduler, monkeypatch):
    monkeypatch.setattr(opening, "_WORKERS", 2.0)
    request = ClusterRequest(scheduler=scheduler[0])
    with (
        pytest.raises(
            ClusterError, match=r"has no worker after 2 seconds; start .*dask worker tcp:"
        ),
        open_workers(request, Progress(), say_nothing),
    ):
        pass
    with (
        pytest.raises(InterruptedRun),
        open_workers(request, Progress(should_stop=lambda: True), say_nothing),
    ):
        pass


def test_a_scheduler_that_disappears_ends_the_work(scheduler):
    address, program = scheduler
    with ExitStack() as stack:
        words = (address, "--nthreads", "1", "--no-dashboard", "--memory-limit", "1GB")
        stack.enter_context(process("dask_worker", *words))
        request = ClusterRequest(scheduler=address)
        workers = stack.enter_context(open_workers(request, Progress(), say_nothing))
        (worker,) = workers.workers
        assert (worker.slots, worker.memory) == (1, 10**9)
        with workers.mapped(pause, 0.1, range(50), Progress().check) as results:
            next(results)
            program.kill()
            begun = time.monotonic()
            with pytest.raises(ClusterError, match=f"the scheduler {address} is gone; no file was"):
                list(results)
        assert time.monotonic() - begun < 60
        with pytest.raises(ClusterError, match="is gone"):
            workers.on_each(os.getpid)


def test_a_cluster_that_loses_its_only_worker_ends_the_work(scheduler, monkeypatch):
    monkeypatch.setattr("hyper_merge.cluster.dask_workers._NO_WORKER", 2.0)
    monkeypatch.setattr("hyper_merge.cluster.dask_workers._RECOUNT", 0.2)
    words = (scheduler[0], "--nthreads", "1", "--no-dashboard", "--no-nanny")
    with (
        process("dask_worker", *words) as worker,
        open_workers(ClusterRequest(scheduler=scheduler[0]), Progress(), say_nothing) as workers,
        workers.mapped(pause, 0.1, range(50), Progress().check) as results,
    ):
        next(results)
        worker.kill()
        with pytest.raises(ClusterError, match="all workers are lost, and none has come for 2 sec"):
            list(results)
