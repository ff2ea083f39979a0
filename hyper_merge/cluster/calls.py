"""What workers run: calls that end when nobody waits for them any more, and what a worker is."""

from __future__ import annotations

import platform
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

import torch

import hyper_merge
from hyper_merge.errors import ClusterError, HyperMergeError, InterruptedRun


@dataclass(frozen=True)
class Outcome:
    """What a call returned, or the refusal that it ended with, which no second try would change."""

    result: Any = None
    refusal: HyperMergeError | None = None


@dataclass(frozen=True)
class Program:
    """The versions that decide what a worker computes, and how it talks."""

    hyper_merge: str
    torch: str
    python: str  # without its last part
    distributed: str

    @classmethod
    def here(cls) -> Program:
        """Returns those of this process."""
        return cls(
            hyper_merge.__version__,
            torch.__version__.partition("+")[0],  # builds for CPU and GPU are of one version
            platform.python_version().rpartition(".")[0],
            version("distributed"),
        )


@dataclass(frozen=True)
class WorkerDescription:
    """What a worker says of itself."""

    program: Program
    capability: str  # of its CPU: other instructions round in another order
    slots: int
    memory: int | None  # bytes


class _RunningCalls:
    """Counts the calls of this process that go on, by the map that they belong to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def change(self, owner: str, by: int) -> None:
        with self._lock:
            self._counts[owner] += by

    def count(self, owner: str) -> int:
        with self._lock:
            return self._counts[owner]


_RUNNING: Final = _RunningCalls()


def call(
    function: Callable[..., Any], common: Any, item: Any, owner: str, program: Program
) -> Outcome:
    """Calls a function of a map on a worker.

    Args:
        function: takes what is common, the item, and a check.
        common: of all items of the map.
        item: one of them.
        owner: the map's id.
        program: the caller's; a worker that came later may be of another one.
    """
    here = Program.here()
    if here != program:
        return Outcome(refusal=ClusterError(f"a worker that came later has {here}, not {program}"))
    _RUNNING.change(owner, 1)
    try:
        return Outcome(function(common, item, make_check()))
    except InterruptedRun:  # nobody waits, or the scheduler begins it anew
        raise
    except HyperMergeError as error:
        return Outcome(refusal=error)
    finally:
        _RUNNING.change(owner, -1)


def make_check() -> Callable[[], None]:
    """Returns a function that raises `InterruptedRun` once the task that calls this is cancelled."""
    from distributed import get_worker  # noqa: PLC0415 - an extra
    from distributed.worker import thread_state  # noqa: PLC0415 - an extra

    worker, key = get_worker(), thread_state.key

    def check() -> None:
        task = worker.state.tasks.get(key)
        if task is None or task.state == "cancelled":
            raise InterruptedRun("stopped because the run that asked for this has ended")

    return check


def give(value: Any) -> Any:
    """Returns a value: as a task it goes to each worker once, and is there again if one is lost."""
    return value


def count_running(owner: str) -> int:
    """Returns how many calls of a map go on in this process."""
    return _RUNNING.count(owner)


def describe_worker(dask_worker: Any) -> WorkerDescription:
    """Returns what the worker is that runs this.

    Args:
        dask_worker: given by dask.
    """
    return WorkerDescription(
        Program.here(),
        torch.backends.cpu.get_cpu_capability(),
        dask_worker.state.nthreads,
        dask_worker.memory_manager.memory_limit,
    )
