"""Maps over independent items in parallel: in order, lazily, with a bounded number in progress."""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, TypeVar

import torch

# Each holds the deviations of one layer, so memory grows with them; on a GPU work waits for room.
_MOST_WORKERS: Final = 4
_MOST_WORKERS_FOR_A_GPU: Final = 8

# Items that were begun or wait for those before them: while one of many times the others' size is at
# work, or the caller writes, the workers go on. Results are small beside what making them takes.
_LEAST_AHEAD: Final = 8

_PATIENCE: Final = 0.1  # seconds of waiting for an item between two checks

_T = TypeVar("_T")
ParallelMap = Callable[..., Iterator[Any]]
"""A function that is called like the built-in `map`."""


@contextmanager
def parallel_map(device: torch.device, check: Callable[[], None]) -> Iterator[ParallelMap]:
    """Gives a `map` that keeps every core of a CPU busy.

    One worker with one thread per core beats a layer at a time on all cores: factorisations
    of some hundred rows, conversions and page faults use one core, however many there are.
    For a GPU some read files and do small factorisations while it computes for others.

    Args:
        device: the device that the work is done on.
        check: called in the caller's thread for every item, and ten times a second while it waits
            for one; may raise, which ends the work: then no further item is begun.
    """
    import_numpy_in_torch()
    threads = torch.get_num_threads()
    most = _MOST_WORKERS if device.type == "cpu" else _MOST_WORKERS_FOR_A_GPU
    count = min(threads, most)
    threads_each = threads // count
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


def import_numpy_in_torch() -> None:
    """Makes torch look for numpy once: up to 2.3, two threads that first do so together deadlock."""
    torch.zeros(1).div_(1.0)


def return_memory() -> None:
    """Returns freed memory to the system, where C's allocator (glibc) can be asked to.

    The allocator keeps memory that small tensors have fragmented: 2 GB after a search for starts, of
    which 0.2 GB are in use.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim:
        trim(0)


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
    return future.result()
