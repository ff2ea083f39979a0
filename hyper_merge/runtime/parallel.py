"""A parallel map over independent layers: ordered, lazy, a bounded number of them at a time."""

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

_MOST: Final = 4  # workers; each holds the deviations of one layer, so memory grows with them

_PATIENCE: Final = 0.1  # seconds of waiting for an item between two checks

_T = TypeVar("_T")
ParallelMap = Callable[..., Iterator[Any]]  # as the built-in map


@contextmanager
def parallel_map(device: torch.device, check: Callable[[], None]) -> Iterator[ParallelMap]:
    """A `map` that keeps every core busy on a CPU, and does one item at a time on other devices.

    A worker with a thread of its own per core beats a layer at a time on all cores: factorisations
    of some hundred rows, conversions and page faults use one core whatever they are given.

    Args:
        device: of the work.
        check: called in the caller's thread for every item, and ten times a second while it waits
            for one; may raise, to stop: then no further item is begun.
    """
    if device.type != "cpu":
        yield partial(_one_by_one, check)
        return
    import_numpy_in_torch()
    threads = torch.get_num_threads()
    count = min(threads, _MOST)
    own = threads // count
    torch.set_num_threads(own)
    # Said in every worker too: until its first loop in torch it would give LAPACK more, and QR's last
    # digits depend on that.
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(own,))
    try:
        yield partial(_in_order, pool, count + 1, check)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
        return_memory()


def import_numpy_in_torch() -> None:
    """Makes torch look for numpy once: up to 2.3 two threads that first do so together lock up."""
    torch.zeros(1).div_(1.0)


def return_memory() -> None:
    """Gives freed memory back to the system, where C's allocator (glibc) can be asked to.

    It keeps what small tensors between large ones have torn apart: 2 GB after a search for starts of
    which 0.2 GB are in use.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim:
        trim(0)


def _one_by_one(
    check: Callable[[], None], function: Callable[..., _T], *arguments: Iterable[Any]
) -> Iterator[_T]:
    for each in zip(*arguments, strict=True):
        check()
        yield function(*each)


def _in_order(
    pool: ThreadPoolExecutor,
    ahead: int,
    check: Callable[[], None],
    function: Callable[..., _T],
    *arguments: Iterable[Any],
) -> Iterator[_T]:
    pending: deque[Future[_T]] = deque()
    try:
        for each in zip(*arguments, strict=True):
            pending.append(pool.submit(function, *each))
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
