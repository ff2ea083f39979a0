"""Long work in a thread: one at a time, followed, stopped, and remembered."""

import threading
import time
from types import SimpleNamespace

import pytest
from at_the_tab import ended, until

from hyper_merge.errors import CheckpointError, InterruptedRun
from hyper_merge.hosts import job_queue
from hyper_merge.hosts.job_queue import BusyError, JobStatus, process_jobs


@pytest.fixture
def gate():
    """Opened at the end at the latest, so that no thread stays."""
    event = threading.Event()
    yield event
    event.set()


def ignore(error):
    raise AssertionError(error)


def test_work_gets_its_own_task_and_returns_a_name(jobs):
    tasks = []

    def work(task, progress):
        tasks.append(task)
        return "mix-2"

    for _ in range(2):
        jobs.start("mix", work, ignore)
        now = ended(jobs)
        assert (now.title, now.outcome, now.result, now.message) == ("mix", "done", "mix-2", "")
        assert now.task == tasks[-1]
    assert len(set(tasks)) == 2
    assert all(task.startswith("task(") and task.endswith(")") for task in tasks)


def test_a_second_job_is_refused_with_the_firsts_progress(jobs, gate):
    def work(task, progress):
        progress.report("solving", 0.42)
        gate.wait()
        return ""

    first = jobs.start("mix", work, ignore)
    until(lambda: first.status.fraction == 0.42)
    with pytest.raises(BusyError, match=r"^mix is still being made \(42%\); wait for it, or stop"):
        jobs.start("other", work, ignore)
    assert jobs.last is first
    gate.set()
    ended(jobs)
    assert jobs.start("other", work, ignore) is not first


def test_of_many_clicks_at_once_one_begins_a_job(jobs, gate):
    ready, outcomes = threading.Barrier(8), []

    def click():
        ready.wait()
        try:
            jobs.start("mix", lambda task, progress: gate.wait() and "", ignore)
            outcomes.append("begun")
        except BusyError:
            outcomes.append("busy")

    threads = [threading.Thread(target=click) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(outcomes) == ["begun"] + ["busy"] * 7


def test_the_last_job_is_kept_when_it_has_ended(jobs):
    assert jobs.last is None
    job = jobs.start("mix", lambda task, progress: "mix", ignore)
    ended(jobs)
    assert jobs.last is job
    assert jobs.last.status.result == "mix"


def test_all_pages_of_a_process_share_the_jobs():
    assert process_jobs() is process_jobs()


def test_a_job_that_runs_stops_at_its_next_step(jobs):
    steps = []

    def work(task, progress):
        while True:
            progress.report("reading", 0.5)
            steps.append(1)
            time.sleep(0.002)

    job = jobs.start("mix", work, ignore)
    until(lambda: steps)
    job.stop()
    assert job.status.stopping
    now = ended(jobs)
    assert (now.outcome, now.message) == ("stopped", "stopped; no file was changed")


def test_many_steps_of_a_job_wake_its_waiter_rarely(jobs):
    def work(task, progress):
        while True:
            progress.report("solving", 0.5)
            time.sleep(0.001)

    job = jobs.start("mix", work, ignore)
    until(lambda: job.status.fraction == 0.5)
    begun = time.monotonic()
    job.wait(0.3)
    assert time.monotonic() - begun >= 0.3
    job.stop()
    job.wait(60)
    assert job.status.outcome == "stopped"


def test_a_cancelled_job_runs_until_its_next_check(jobs, gate):
    begun = threading.Event()

    def work(task, progress):
        progress.report("writing", 0.9)
        begun.set()
        gate.wait()
        progress.check()
        return "mix"

    job = jobs.start("mix", work, ignore)
    begun.wait(60)
    job.stop()
    assert (job.status.outcome, job.status.stopping) == ("running", True)
    with pytest.raises(BusyError):
        jobs.start("other", work, ignore)
    gate.set()
    assert ended(jobs).outcome == "stopped"


def test_a_cancelled_waiting_job_lets_the_next_begin(jobs, gate):
    outcome = []

    def waiting(task, progress):
        gate.wait()
        try:
            progress.report("starting", 0.0)
        except InterruptedRun:
            outcome.append("never began")
            raise

    job = jobs.start("mix", waiting, ignore)
    assert job.status.phase == "waiting for the queue"
    job.stop()
    assert job.status.outcome == "stopped"
    jobs.start("other", lambda task, progress: "other", ignore)
    assert ended(jobs).result == "other"
    gate.set()
    until(lambda: outcome)
    assert (job.status.outcome, job.status.result) == ("stopped", "")


def test_a_late_cancel_leaves_a_finished_job_done(jobs):
    job = jobs.start("mix", lambda task, progress: progress.report("x", 1.0) or "mix", ignore)
    ended(jobs)
    job.stop()
    assert (job.status.outcome, job.status.result) == ("done", "mix")


def test_a_refusal_is_a_message_and_no_error(jobs):
    def work(task, progress):
        raise CheckpointError("a.safetensors is cut short; download it again")

    jobs.start("mix", work, ignore)
    now = ended(jobs)
    assert (now.outcome, now.message) == (
        "refused",
        "a.safetensors is cut short; download it again",
    )


def test_an_unexpected_error_is_logged_and_shown_in_short(jobs):
    error, log = RuntimeError("CUDA out of memory\nTried to allocate\n" + "x" * 999), []

    def work(task, progress):
        raise error

    jobs.start("mix", work, log.append)
    now = ended(jobs)
    assert (now.outcome, now.message) == ("failed", "RuntimeError: CUDA out of memory")
    assert log == [error]
    jobs.start("mix", lambda task, progress: "mix", ignore)
    assert ended(jobs).outcome == "done"


def test_each_note_is_delivered_once_and_in_order(jobs):
    def work(task, progress):
        for text in ("b", "a", "b", "a"):
            progress.warn(text)
        return ""

    jobs.start("mix", work, ignore)
    assert ended(jobs).notes == ("b", "a")


@pytest.mark.parametrize(
    ("fraction", "elapsed", "left"),
    [(0.25, 30, 90), (0.5, 8, 8), (1.0, 8, 0), (0.019, 30, None), (0.5, 0.9, None), (0, 0, None)],
)
def test_the_time_left_follows_from_the_pace_so_far(fraction, elapsed, left):
    now = JobStatus("task(x)", "mix", fraction=fraction, elapsed=elapsed)
    assert now.seconds_left == (None if left is None else pytest.approx(left))


def test_time_counts_from_the_first_step_to_the_end(jobs, gate, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(job_queue, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    begin = threading.Event()

    def work(task, progress):
        begin.wait(60)
        progress.report("reading", 0.0)
        gate.wait()
        return ""

    job = jobs.start("mix", work, ignore)
    clock[0] += 50
    assert job.status.elapsed == 0
    begin.set()
    until(lambda: job.status.phase == "reading")
    clock[0] += 7
    assert job.status.elapsed == 7
    gate.set()
    until(lambda: job.status.outcome != "running")
    clock[0] += 1000
    assert job.status.elapsed == 7


def test_who_waits_is_woken_by_a_change(jobs, gate):
    def work(task, progress):
        gate.wait()
        progress.report("solving", 0.5)
        return ""

    job = jobs.start("mix", work, ignore)
    threading.Timer(0.02, gate.set).start()
    start = time.monotonic()
    job.wait(120)
    assert time.monotonic() - start < 60
    ended(jobs)
    start = time.monotonic()
    job.wait(120)
    assert time.monotonic() - start < 60
