"""A source of randomness, and a map of several workers even on one core."""

from collections.abc import Iterator

import pytest
import torch

from hyper_merge.runtime.parallel import ParallelMap, parallel_map


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def parallel() -> Iterator[ParallelMap]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with parallel_map(torch.device("cpu"), lambda: None) as mapper:
            yield mapper
    finally:
        torch.set_num_threads(threads)
