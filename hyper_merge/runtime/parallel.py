"""Maps over independent items in parallel: in order, lazily, with a bounded number in progress."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from mmap import PAGESIZE
from typing import Any, Final, TypeVar

import torch

from hyper_merge.runtime.progress import Progress

# Each holds the deviations of one layer, so memory grows with them; on a GPU work waits for room.
_MOST_WORKERS: Final = 4
_MOST_WORKERS_FOR_A_GPU: Final = 8

# Items that were begun or wait for those before them: while one of many times the others' size is at
# work, or the caller writes, the workers go on. Results are small beside what making them takes.
_LEAST_AHEAD: Final = 8
_GROWTH: Final = 2**27  # bytes by which memory may grow before freed memory is returned

# Seconds between two looks at the memory: while another thread works, each takes a tenth of a millisecond.
_LOOK_EVERY: Final = 0.02

_PATIENCE: Final = 0.1  # seconds of waiting for an item between two checks

_T = TypeVar("_T")
_Item = TypeVar("_Item")
ParallelMap = Callable[..., Iterator[Any]]
"""A function that is called like the built-in `map`."""


@dataclass(frozen=True)
class LayerMaps:
    """Maps over what is computed for layers.

    Attributes:
        layers: Calls pure functions, which the other processes that it may use can import by name.
        small: For what takes less time than it would take to travel; in this process.
    """

    layers: ParallelMap
    small: ParallelMap


def worker_count(device: torch.device) -> int:
    """Returns how many items `parallel_map` works on at a time."""
    most = _MOST_WORKERS if device.type == "cpu" else _MOST_WORKERS_FOR_A_GPU
    return min(torch.get_num_threads(), most)


class MemoryLimit:
    """Lets work that takes memory wait until the memory of all that is in progress suffices for it."""

    def __init__(self, limit: int) -> None:
        """Takes the bytes that all work in progress may have together."""
        self._limit = limit
        self._changed = threading.Condition()
        self._held: list[int] = []

    @contextmanager
    def holding(self, nbytes: int) -> Iterator[None]:
        """Waits for so many bytes, and holds them within the block; more than the limit for work alone."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._held or sum(self._held) + nbytes <= self._limit
            )
            self._held.append(nbytes)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(nbytes)
                self._changed.notify_all()


@contextmanager
def parallel_map(
    device: torch.device, check: Callable[[], None], threads_each: int | None = None
) -> Iterator[ParallelMap]:
    """Gives a `map` that keeps every core of a CPU busy.

    One worker with one thread per core beats a layer at a time on all cores: factorisations
    of some hundred rows, conversions and page faults use one core, however many there are.
    For a GPU some read files and do small factorisations while it computes for others.

    Args:
        device: the device that the work is done on.
        check: called in the caller's thread for every item, and ten times a second while it waits
            for one; may raise, which ends the work: then no further item is begun.
        threads_each: of every item; None for an even share of the cores.
    """
    import_numpy_in_torch()
    threads = torch.get_num_threads()
    count = worker_count(device)
    threads_each = threads_each or threads // count
    torch.set_num_threads(threads_each)
    # Set in every worker too: until its first loop in torch it would give LAPACK more threads, and the
    # last digits of QR depend on their number.
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(threads_each,))
    try:
        yield partial(_in_order, pool, max(count + 1, _LEAST_AHEAD), check)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
        return_memory()


def map_with_progress(
    function: Callable[[_Item], _T], costs: Mapping[_Item, float], phase: str, progress: Progress
) -> list[_T]:
    """Returns a function's results for all items, in their order, from every core of the CPU.

    Args:
        function: of an item.
        costs: of the items.
        phase: its name in the progress.
        progress: by the costs; checked between items.
    """
    counter = progress.counter(phase, costs)
    results = []
    with parallel_map(torch.device("cpu"), counter.report) as parallel, counter:
        for item, result in zip(costs, parallel(function, costs), strict=True):
            results.append(result)
            counter.finish(item)
    return results


def import_numpy_in_torch() -> None:
    """Makes torch look for numpy once: up to 2.3, two threads that first do so together deadlock."""
    torch.zeros(1).div_(1.0)


class OwnMemory:
    """The memory that this process has to itself, as far as the system tells."""

    def __init__(self) -> None:
        """Begins before anything has grown."""
        self._usual = 0  # bytes that were left when freed memory was returned last
        self._next = 0.0  # when to look again, in seconds

    def return_if_grown(self) -> None:
        """Returns freed memory to the system if there is a good deal more than after the last time.

        It looks fifty times a second at most. The C library would fill what lies between freed
        tensors with small things, and never use it for tensors of the same size again.
        """
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _LOOK_EVERY
        size = _own_bytes()
        if size > self._usual + _GROWTH:
            return_memory()
            self._usual = _own_bytes()
        else:
            self._usual = min(size, self._usual)


MEMORY: Final = OwnMemory()
"""The memory of this process."""


def return_memory() -> None:
    """Returns freed memory to the system, where C's allocator (glibc) can be asked to.

    The allocator keeps memory that small tensors have fragmented: 2 GB after a search for starts, of
    which 0.2 GB are in use.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim:
        trim(0)


def _own_bytes() -> int:
    """Returns the bytes of memory that is no mapping of a file; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - it is read very often
            _, resident, shared, *_ = map(int, file.read().split())
    except (OSError, ValueError):
        return 0
    return (resident - shared) * PAGESIZE


def _in_order(
    pool: ThreadPoolExecutor,
    ahead: int,
    check: Callable[[], None],
    function: Callable[..., _T],
    *arguments: Iterable[Any],
) -> Iterator[_T]:
    pending: deque[Future[_T]] = deque()
    try:
        for item in zip(*arguments, strict=True):
            pending.append(pool.submit(function, *item))
            if len(pending) > ahead:
                yield _result(pending.popleft(), check)
        while pending:
            yield _result(pending.popleft(), check)
    finally:
        for future in pending:
            future.cancel()


def _result(future: Future[_T], check: Callable[[], None]) -> _T:
    check()
    while not wait([future], _PATIENCE).done:
        check()
    MEMORY.return_if_grown()
    return future.result()
