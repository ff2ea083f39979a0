"""Whole merges with the search for a start that ships."""

import inspect

from tiny_family import merge

from hyper_merge.decomposition.initialization import SearchEffort, best_start
from hyper_merge.solver import solve


def test_the_search_that_ships_is_the_full_one():
    assert solve.DEFAULT_EFFORT is SearchEffort.FULL
    assert inspect.signature(best_start).parameters["effort"].default is SearchEffort.FULL
    assert SearchEffort(8, ((6, 4), (12, 2), (20, 1)), 6, 48, 48) == SearchEffort.FULL


def test_the_full_search_beats_greedy_and_the_average(files, tmp_path):
    settings = {"layer_weights": "plain", "allocation": "even", "multipliers": "shared"}
    losses = {
        method: merge(
            files,
            tmp_path / method,
            effort=SearchEffort.FULL,
            method=method,
            iterations=20,
            **settings,
        ).report.loss
        for method in ("joint", "greedy")
    }
    assert losses["joint"] < losses["greedy"] < 1.0  # the average alone leaves 1.0
