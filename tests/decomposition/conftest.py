"""A source of randomness, and a map of several workers even on one core."""

from collections.abc import Iterator

import pytest
import torch

from hyper_merge.decomposition import initialization as starts
from hyper_merge.runtime.parallel import ParallelMap, parallel_map

_SHORTENED = ("_RANDOM", "_ROUNDS", "_GREEDY_TURNS", "_PILOT_ENTRIES")
_SEARCH = {name: getattr(starts, name) for name in _SHORTENED}


@pytest.fixture(autouse=True)
def _whole_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of whole merges shorten the search for a start; here it is tested."""
    for name, value in _SEARCH.items():
        monkeypatch.setattr(starts, name, value)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def parallel() -> Iterator[ParallelMap]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with parallel_map(torch.device("cpu"), lambda: None) as each:
            yield each
    finally:
        torch.set_num_threads(threads)
