"""A run's fractions are those of its parts, and whoever works on it hears that it should stop."""

import threading
import time

import pytest
import torch

from hyper_merge.errors import InterruptedRun
from hyper_merge.runtime.parallel import parallel_map
from hyper_merge.runtime.progress import Progress

CPU = torch.device("cpu")


class Recorder:
    """A control's callables: what was told, and a wish that can be made."""

    def __init__(self):
        self.told = []
        self.wish = False

    @property
    def progress(self):
        return Progress(lambda phase, x: self.told.append((phase, x)), lambda: self.wish)


def test_parts_take_fractions_in_proportion_to_their_costs():
    recorder = Recorder()
    for part in recorder.progress.split([1, 0, 2, 7]):
        part.report("begin", 0)
        part.report("end", 1)
    assert [x for _, x in recorder.told] == pytest.approx([0, 0.1, 0.1, 0.1, 0.1, 0.3, 0.3, 1])
    assert recorder.told[-1][1] == 1
    assert [x for _, x in recorder.told] == sorted(x for _, x in recorder.told)


def test_parts_without_any_cost_are_no_error():
    recorder = Recorder()
    for part in recorder.progress.split([0, 0]):
        part.report("x", 1)
    assert recorder.told == [("x", 0), ("x", 0)]


def test_a_tally_tells_what_is_done_and_never_more_than_an_item_costs():
    recorder = Recorder()
    counter = recorder.progress.counter("work", {"a": 3, "b": 1})
    counter.add("a", 1)
    counter.tell()
    counter.add("a", 100)
    counter.tell()
    counter.finish("b")
    assert recorder.told == [("work", 0.25), ("work", 0.75), ("work", 1.0)]


def test_a_tally_without_cost_is_no_error():
    recorder = Recorder()
    recorder.progress.counter("work", {}).tell()
    recorder.progress.counter("work", {"a": 0.0}).finish("a")
    assert recorder.told == [("work", 0.0)] * 2


def test_who_counts_hears_the_wish_to_stop_and_that_the_block_was_left():
    recorder = Recorder()
    with recorder.progress.counter("work", {"a": 1}) as counter:
        recorder.wish = True
        with pytest.raises(InterruptedRun):
            counter.add("a", 1)
        with pytest.raises(InterruptedRun):
            counter.tell()
        recorder.wish = False
    with pytest.raises(InterruptedRun):
        counter.add("a", 1)
    assert recorder.told == []


@pytest.mark.parametrize("device", [CPU, torch.device("meta")])
def test_a_map_asks_for_every_item_and_begins_none_after_an_error(device):
    begun, asked = [], []

    def check():
        asked.append(threading.current_thread())
        if len(asked) == 3:
            raise KeyboardInterrupt

    def run():
        with parallel_map(device, check) as each:
            return list(each(begun.append, range(100)))

    with pytest.raises(KeyboardInterrupt):
        run()
    assert set(asked) == {threading.current_thread()}
    assert len(asked) == 3
    assert len(begun) <= 3 + torch.get_num_threads() + 2


def test_a_map_asks_while_it_waits_for_a_long_item():
    stop = threading.Event()
    asked = []

    def check():
        asked.append(time.perf_counter())
        if len(asked) == 4:
            stop.set()

    with parallel_map(CPU, check) as each:
        assert list(each(stop.wait, [120])) == [True]
    assert asked[-1] - asked[0] < 60


def test_an_error_of_the_run_ends_an_item_that_counts():
    """As with Ctrl-C, which only the main thread hears."""
    progress, begun = Progress(), threading.Event()
    counter = progress.counter("work", {"a": 1})

    def endless(item):
        while True:
            counter.add(item, 0.001)
            begun.set()

    def check():
        if begun.is_set():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), parallel_map(CPU, check) as each, counter:
        list(each(endless, ["a"]))
