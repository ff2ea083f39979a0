"""Workers give the same results every time."""

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
