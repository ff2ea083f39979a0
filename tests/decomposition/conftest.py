"""A source of randomness, and a map of several workers even on one core."""

from collections.abc import Iterator

import pytest
import torch

from hyper_merge.workers import Each, workers


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def parallel() -> Iterator[Each]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with workers(torch.device("cpu")) as each:
            yield each
    finally:
        torch.set_num_threads(threads)
