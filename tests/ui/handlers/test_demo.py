"""The demo from the tab: its checkpoints are made and picked, or nothing is left."""

import json
import time
from dataclasses import replace

import pytest
from at_the_tab import ended, last_words, no_thread, unchanged, until, values, words
from tiny_family import TINY, temporaries

from hyper_merge.hosts.standalone import Standalone
from hyper_merge.operations import demo
from hyper_merge.operations.catalogue import Catalogue
from hyper_merge.operations.demo import DEMO_RANKS
from hyper_merge.runtime.progress import Progress
from hyper_merge.ui.handlers.merge import (
    pick_demo_checkpoints,
    show_merge_result,
    start_demo,
    stop_job,
)
from hyper_merge.ui.handlers.picker import show_plan


@pytest.fixture
def small(monkeypatch):
    """A demo of smaller layers."""
    monkeypatch.setattr(demo, "_SPEC", replace(TINY, count=4))


def test_the_demo_makes_and_picks_checkpoints(tmp_path, jobs, small):
    host = Standalone(tmp_path / "empty")
    assert start_demo(host, jobs) == ""
    assert ended(jobs).message == ""
    picked, ranks = pick_demo_checkpoints(host, jobs, "")
    names = ["anime", "landscape", "portrait", "watercolour"]
    assert json.loads(picked) == [f"{name}.safetensors" for name in names]
    assert ranks == ", ".join(map(str, DEMO_RANKS))
    assert all(map(unchanged, pick_demo_checkpoints(host, jobs, "it is still being made")))
    form = values(checkpoints=json.loads(picked), ranks=ranks, name="")
    answer, *_ = show_plan(host, Catalogue(), "", *form)
    assert "instead of" in words(answer)
    assert all(map(unchanged, show_merge_result(host, jobs)))


def test_a_stopped_demo_picks_nothing_and_leaves_nothing(tmp_path, jobs, small, monkeypatch):
    host, begun = Standalone(tmp_path / "empty"), []
    step = Progress.report

    def slow(progress, phase, fraction):
        begun.append(fraction)
        time.sleep(0.002)
        step(progress, phase, fraction)

    monkeypatch.setattr(Progress, "report", slow)
    start_demo(host, jobs)
    until(lambda: begun)
    stop_job(jobs)
    assert words(last_words(jobs)) == "Stopped: no file was changed"
    assert all(map(unchanged, pick_demo_checkpoints(host, jobs, "")))
    until(no_thread)
    assert host.checkpoints() == {}
    assert not temporaries(tmp_path)
