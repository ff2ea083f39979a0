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
    """The callables of a progress: its reports, and a stop that can be requested."""

    def __init__(self):
        self.reports = []
        self.stop_requested = False

    @property
    def progress(self):
        return Progress(
            lambda phase, x: self.reports.append((phase, x)), lambda: self.stop_requested
        )


def test_parts_take_fractions_in_proportion_to_their_costs():
    recorder = Recorder()
    for part in recorder.progress.split([1, 0, 2, 7]):
        part.report("begin", 0)
        part.report("end", 1)
    assert [x for _, x in recorder.reports] == pytest.approx([0, 0.1, 0.1, 0.1, 0.1, 0.3, 0.3, 1])
    assert recorder.reports[-1][1] == 1
    assert [x for _, x in recorder.reports] == sorted(x for _, x in recorder.reports)


def test_parts_without_any_cost_are_no_error():
    recorder = Recorder()
    for part in recorder.progress.split([0, 0]):
        part.report("x", 1)
    assert recorder.reports == [("x", 0), ("x", 0)]


def test_counter_reports_at_most_each_items_cost():
    recorder = Recorder()
    counter = recorder.progress.counter("work", {"a": 3, "b": 1})
    counter.add("a", 1)
    counter.report()
    counter.add("a", 100)
    counter.report()
    counter.finish("b")
    assert recorder.reports == [("work", 0.25), ("work", 0.75), ("work", 1.0)]


def test_counter_without_costs_is_no_error():
    recorder = Recorder()
    recorder.progress.counter("work", {}).report()
    recorder.progress.counter("work", {"a": 0.0}).finish("a")
    assert recorder.reports == [("work", 0.0)] * 2


def test_counting_stops_on_request_and_after_the_block():
    recorder = Recorder()
    with recorder.progress.counter("work", {"a": 1}) as counter:
        recorder.stop_requested = True
        with pytest.raises(InterruptedRun):
            counter.add("a", 1)
        with pytest.raises(InterruptedRun):
            counter.report()
        recorder.stop_requested = False
    with pytest.raises(InterruptedRun):
        counter.add("a", 1)
    assert recorder.reports == []


@pytest.mark.parametrize("device", [CPU, torch.device("meta")])
def test_map_begins_no_item_after_an_error(device):
    begun, checks = [], []

    def check():
        checks.append(threading.current_thread())
        if len(checks) == 3:
            raise KeyboardInterrupt

    def run():
        with parallel_map(device, check) as parallel:
            return list(parallel(begun.append, range(100)))

    with pytest.raises(KeyboardInterrupt):
        run()
    assert set(checks) == {threading.current_thread()}
    assert len(checks) == 3
    assert len(begun) <= 3 + max(torch.get_num_threads() + 2, 8)


def test_map_checks_while_it_waits():
    stop = threading.Event()
    checks = []

    def check():
        checks.append(time.perf_counter())
        if len(checks) == 4:
            stop.set()

    with parallel_map(CPU, check) as parallel:
        assert list(parallel(stop.wait, [120])) == [True]
    assert checks[-1] - checks[0] < 60


def test_error_elsewhere_ends_a_counting_item():
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

    with pytest.raises(KeyboardInterrupt), parallel_map(CPU, check) as parallel, counter:
        list(parallel(endless, ["a"]))
