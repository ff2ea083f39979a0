"""What a solve keeps for every layer lies in a bounded part of the memory."""

import sys
import threading
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch

from hyper_merge.decomposition.ll1 import StoppingCriterion, initial_factors, solve_ll1
from hyper_merge.decomposition.problem import Batch, Problem
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime import parallel
from hyper_merge.runtime.parallel import return_memory
from hyper_merge.runtime.progress import Progress
from hyper_merge.runtime.scratch import Scratch
from hyper_merge.solver.rank_pruning import GroupSolution, prune_ranks
from hyper_merge.solver.refinement import refine, try_sweeps

LIMIT = 4 * 2**20  # bytes
SIDE, RANKS = 256, (64, 32)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


class HalfOfTheRanks:
    """An allowance that every layer divides alike."""

    def keep(self, energies):
        return dict.fromkeys(energies, tuple(rank // 2 for rank in RANKS))


def anonymous():
    """Returns the bytes of memory of this process that are no mapping of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def batch_of(index):
    """Returns a layer whose slices are made when they are needed."""

    def slices():
        generator = torch.Generator().manual_seed(index)
        return torch.randn(1, 2, SIDE, SIDE, generator=generator)

    return Batch(slices, RANKS, (index,))


def solve(layers, scratch):
    """Runs the stages of a solve with adaptive ranks."""
    batches = tuple(map(batch_of, range(layers)))
    problem = Problem(batches, 2.0 * SIDE**2 * layers, keep=scratch.keep)
    start = torch.eye(2, dtype=torch.float64)
    factors = iter(initial_factors(problem, start, torch.Generator().manual_seed(0)))
    solution = solve_ll1(problem, factors, start, StoppingCriterion(1, 0.0))
    groups = [GroupSolution.of("unet", problem, solution)]
    del solution
    groups = prune_ranks(groups, HalfOfTheRanks(), map)
    groups = [try_sweeps(groups, 1, map)]
    return refine(
        groups, Recipe(name="mix", models=(Path("a"), Path("b")), iterations=2), Progress(), map
    )


def solve_aside(layers, folder, limit=LIMIT):
    with closing(Scratch(folder, limit)) as scratch:
        return solve(layers, scratch)


def peak_of(work):
    """Returns by how many bytes the memory grows during some work."""
    return_memory()
    before, peaks, ends = anonymous(), [0], threading.Event()

    def watch():
        while not ends.wait(0.002):
            peaks[0] = max(peaks[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        ends.set()
        watcher.join()
    return peaks[0] - before


def test_memory_does_not_grow_with_the_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "_GROWTH", 2**20)
    solve_aside(4, tmp_path)  # what is loaded once
    few, many = (peak_of(partial(solve_aside, count, tmp_path)) for count in (8, 96))
    one_set = 96 * 2 * SIDE * sum(RANKS) * 4
    # 7 MB here and 21 MB without a limit, of 19: what other tests left may free or grow meanwhile.
    assert many - few < 0.75 * one_set


def test_results_are_the_same_wherever_they_were_kept(tmp_path):
    plain, aside = solve(3, Scratch()), solve_aside(3, tmp_path, 0)
    assert plain.losses == aside.losses
    for one, other in zip(plain.factors, aside.factors, strict=True):
        assert torch.equal(one.up, other.up)
        assert torch.equal(one.down, other.down)
