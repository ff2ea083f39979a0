"""A clock of runs reports in the caller's thread alone, and stops in all."""

from threading import Thread

import pytest

from hyper_merge.calibration.run_clock import RunClock
from hyper_merge.errors import InterruptedRun
from hyper_merge.runtime.progress import Progress


def test_a_clock_counts_to_the_end():
    reports = []
    clock = RunClock(Progress(lambda *report: reports.append(report)), "running", 4)
    clock.advance(1)
    clock.advance(5)  # a cost is an estimate
    clock.finish()
    assert reports == [("running", 0), ("running", 0.25), ("running", 1), ("running", 1)]


def test_threads_of_a_device_report_nothing():
    reports, checks = [], []
    clock = RunClock(
        Progress(lambda *report: reports.append(report), lambda: bool(checks.append(1))), "", 4
    )
    begun, asked = len(reports), len(checks)
    thread = Thread(target=clock.advance, args=(1,))
    thread.start()
    thread.join()
    assert (len(reports) - begun, len(checks) - asked) == (0, 1)


def test_a_stop_ends_the_next_reading():
    stopped = []
    clock = RunClock(Progress(should_stop=lambda: bool(stopped)), "running", 4)
    clock.advance(1)
    stopped.append(True)
    with pytest.raises(InterruptedRun):
        clock.advance(1)
