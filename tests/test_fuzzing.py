"""Hostile files in place of every file that is read: a refusal or a warning, never anything else.

`python benchmarks/fuzz.py` tries thousands of each, and limits time and memory.
"""

import time

import pytest
from fuzzing.targets import TARGETS
from fuzzing.workshop import Workshop

INPUTS = 15  # of the cheapest target
SECONDS = 20.0  # for one input on a busy machine; most take milliseconds


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("fuzzing") / "models")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_hostile_files_are_refused_or_read(target, workshop):
    assert target.is_taken(workshop, workshop.content(target.file(workshop))), "the valid sample"
    for number in range(max(2, INPUTS // target.cost)):
        began = time.monotonic()
        try:
            target.is_taken(workshop, target.damaged(workshop, number))
        except Exception as error:
            raise AssertionError(f"{target.name}, input {number}: {error!r}") from error
        assert time.monotonic() - began < SECONDS, f"{target.name}, input {number}"
