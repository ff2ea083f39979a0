"""Workers give the same results every time, within the memory that they may take."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hyper_merge.runtime import parallel as parallel_module
from hyper_merge.runtime.parallel import MemoryLimit, OwnMemory, parallel_map


def test_factorisations_are_equal_in_every_worker():
    """With a thread too many in a new worker, LAPACK's last digits differ now and then."""
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(96, 24, generator=generator) for _ in range(8)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        results = []
        for _ in range(30):  # each with workers of its own
            with parallel_map(torch.device("cpu"), lambda: None) as parallel:
                results.append(torch.stack([q for q, _ in parallel(torch.linalg.qr, matrices)]))
        assert all(torch.equal(other, results[0]) for other in results)
    finally:
        torch.set_num_threads(before)


def test_workers_go_on_while_one_item_takes_long():
    """One worker is held up by the first item until the other has done the six that follow."""
    done, enough = [], threading.Event()

    def work(item):
        if item:
            done.append(item)
            if len(done) == 6:
                enough.set()
        else:
            assert enough.wait(20), done
        return item

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with parallel_map(torch.device("cpu"), lambda: None) as parallel:
            assert list(parallel(work, range(20))) == list(range(20))
    finally:
        torch.set_num_threads(before)


def test_work_waits_for_the_memory_of_other_work():
    limit, lock, held, most = MemoryLimit(10), threading.Lock(), [], []

    def work(nbytes):
        with limit.holding(nbytes):
            with lock:
                held.append(nbytes)
                most.append(sum(held))
                most_at_once.append(len(held))
            time.sleep(0.01)
            with lock:
                held.remove(nbytes)
        return nbytes

    most_at_once = []
    sizes = [3, 3, 25, 4, 9, 2, 2, 2, 10, 3]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, sizes)) == sizes
    assert max(total for total in most if total != 25) <= 10
    assert 25 in most  # alone
    assert max(most_at_once) > 1


def test_work_that_fails_gives_its_memory_back():
    limit = MemoryLimit(10)
    with pytest.raises(ZeroDivisionError), limit.holding(10):
        _ = 1 / 0
    with limit.holding(10):
        pass


def test_freed_memory_goes_back_where_it_has_grown(monkeypatch):
    sizes, returned = iter([100, 110, 130, 90, 60, 75, 90, 65]), []
    monkeypatch.setattr(parallel_module, "_GROWTH", 25)
    monkeypatch.setattr(parallel_module, "_own_bytes", lambda: next(sizes))
    monkeypatch.setattr(parallel_module, "return_memory", lambda: returned.append(True))
    monkeypatch.setattr(parallel_module, "_LOOK_EVERY", 0.0)
    memory = OwnMemory()
    counts = []
    for _ in range(6):
        memory.return_if_grown()
        counts.append(len(returned))
    # 100: more than nothing, leaves 110; 130 and 90: no; 60: less than ever; 75: no; 90: again
    assert counts == [1, 1, 1, 1, 1, 2]


def test_memory_is_not_looked_at_more_often_than_it_can_grow(monkeypatch):
    looks, now = [], [100.0]
    monkeypatch.setattr(parallel_module, "_own_bytes", lambda: looks.append(now[0]) or 0)
    monkeypatch.setattr(parallel_module.time, "monotonic", lambda: now[0])
    memory = OwnMemory()
    for _ in range(10):
        memory.return_if_grown()
        now[0] += parallel_module._LOOK_EVERY * 0.26
    assert len(looks) == 3
