"""Workers give the same results every time."""

import threading

import torch

from hyper_merge.runtime.parallel import parallel_map


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
