"""A merge from the tab: begun, followed, stopped, refused; in the app and in the WebUI."""

import logging
import shutil
import threading
import time
from collections import namedtuple

import pytest
from at_the_tab import (
    EVIL,
    NAMES,
    ended,
    kinds,
    last_words,
    no_thread,
    tags,
    unchanged,
    until,
    values,
    words,
)
from fake_webui.styles import PromptStyle
from tiny_family import snapshot, temporaries

from hyper_merge.errors import InterruptedRun
from hyper_merge.hosts.job_queue import JobStatus
from hyper_merge.hosts.tasks import run_preflight
from hyper_merge.operations.catalogue import Catalogue
from hyper_merge.runs.deletion import delete_run
from hyper_merge.runs.run import load_run
from hyper_merge.ui.handlers.merge import (
    pick_demo_checkpoints,
    show_merge_result,
    start_demo,
    start_merge,
    stop_job,
    watch_job,
)
from hyper_merge.ui.handlers.picker import show_plan


@pytest.fixture
def endless(monkeypatch):
    """Merges that go on until they are stopped; how many have begun."""
    begun, over = [], threading.Event()

    def run_merge(preflight, progress):
        begun.append(preflight.recipe.name)
        while not over.is_set():  # where a test failed before it stopped the merge
            progress.report("reading the checkpoints", 0.25)
            time.sleep(0.002)
        raise InterruptedRun("stopped; no file was changed")

    monkeypatch.setattr("hyper_merge.hosts.tasks.run_merge", run_merge)
    yield begun
    over.set()


@pytest.fixture
def failing(monkeypatch):
    """Merges that meet an error which nobody expected."""

    def run_merge(preflight, progress):
        def deep_inside():
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nat layer 7")

        progress.report("solving", 0.5)
        deep_inside()

    monkeypatch.setattr("hyper_merge.hosts.tasks.run_merge", run_merge)


def test_a_merge_is_begun_followed_and_its_run_found(host, jobs, root):
    assert start_merge(host, jobs, *values()) == ""
    seen = [status for status, *_ in watch_job(jobs)]
    assert kinds(seen[-1]) == ["good"]
    assert words(seen[-1]).startswith("Done: mix, in ")
    assert all(f'data-task="{jobs.last.status.task}"' in status for status in seen[:-1])
    panel = show_merge_result(host, jobs)
    assert panel[0] == ""
    assert panel[1]["visible"] is True
    assert words(panel[2]).startswith("mix ✓ Done3 checkpoints")
    assert panel[10] == "mix"
    loaded = load_run(host.folders(), "mix")
    assert loaded.missing == ()
    assert not temporaries(root)
    delete_run(loaded, host.folders())
    assert all(map(unchanged, show_merge_result(host, jobs)[1:])), "no error on a page that opens"


def test_a_merge_without_a_name_has_the_suggested_one(host, jobs):
    assert start_merge(host, jobs, *values(name="", checkpoints=NAMES[:2], ranks="2")) == ""
    assert ended(jobs).result == "hyper-a-2"
    assert show_merge_result(host, jobs)[10] == "hyper-a-2"


def test_other_ranks_share_the_hyper_model(host, jobs, run, checkpoints, monkeypatch):
    def no_pass(*arguments):
        raise AssertionError("the checkpoints were read again")

    monkeypatch.setattr("hyper_merge.operations.merge.merge.stream_layers", no_pass)
    before = (checkpoints / "mix.safetensors").stat().st_ino
    start_merge(host, jobs, *values(ranks="3, 2"))
    assert ended(jobs).message == ""
    panel = show_merge_result(host, jobs)
    assert panel[10] == "mix-2"
    assert (checkpoints / "mix.safetensors").stat().st_ino == before
    models = sorted(path.name for path in checkpoints.glob("*.safetensors"))
    assert models == [*NAMES, "mix.safetensors"]
    assert load_run(host.folders(), "mix-2").hyper_model == checkpoints / "mix.safetensors"


def test_a_checkpoint_of_any_name_is_merged_and_shown(host, jobs, checkpoints):
    (checkpoints / "a.safetensors").rename(checkpoints / f"{EVIL}.safetensors")
    (checkpoints / "b.safetensors").rename(checkpoints / "$x^$.safetensors")
    picked = [f"{EVIL}.safetensors", "$x^$.safetensors"]
    start_merge(host, jobs, *values(checkpoints=picked, ranks="2"))
    assert ended(jobs).message == ""
    panel = show_merge_result(host, jobs)
    assert panel[4]["choices"] == [EVIL, "$x^$"]
    plots = panel[7:10]
    texts = [
        text for text in (*panel[:7], *panel[10:-1]) if isinstance(text, str)
    ]  # the last: JSON
    assert EVIL in words(panel[3])
    assert not any("img" in tags(text) for text in texts)
    assert [plot.count("<img") for plot in plots] == [1, 1, 1], "no more than the plots themselves"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoints": []}, "A merge needs two or more checkpoints; none picked."),
        ({"checkpoints": None}, "A merge needs two or more checkpoints; none picked."),
        ({"checkpoints": NAMES[:1]}, "A merge needs two or more checkpoints; 1 picked."),
        ({"checkpoints": ["/etc/passwd", NAMES[0]]}, "/etc/passwd is no longer in the list"),
        (
            {"ranks": "x"},
            "Ranks: expected a list of whole numbers, such as 128, 64, 32, 16, or small",
        ),
        ({"ranks": ""}, "Ranks: expected a list of whole numbers"),
        ({"weights": "1"}, "Weights: expected 3 numbers, one per checkpoint, got 1"),
        ({"name": "no/where"}, "Name: the path separator"),
        ({"seed": None}, "Seed: expected a whole number"),
        ({"device": "cuda:99"}, "device cuda:99 was asked for, but"),
        ({"base": "gone.ckpt"}, "gone.ckpt is no longer in the list"),
    ],
)
def test_an_impossible_merge_is_reported_and_nothing_begins(host, jobs, changes, message):
    answer = start_merge(host, jobs, *values(**changes))
    assert kinds(answer) == ["bad"]
    assert words(answer).startswith(message)
    assert jobs.last is None


def test_the_same_merge_again_is_refused(host, jobs, run):
    answer = start_merge(host, jobs, *values())
    assert kinds(answer) == ["info"]
    assert words(answer).startswith("the run mix is this very merge already")
    assert jobs.last is None


def test_a_name_that_is_taken_is_refused(host, jobs, checkpoints):
    shutil.copy2(checkpoints / "c.safetensors", checkpoints / "taken.safetensors")
    answer = start_merge(host, jobs, *values(name="taken"))
    assert "choose another name" in words(answer)
    assert jobs.last is None


def test_a_damaged_file_is_refused(host, jobs, checkpoints):
    (checkpoints / "b.safetensors").write_bytes(b"<html>404</html>")
    answer = start_merge(host, jobs, *values())
    assert kinds(answer) == ["bad"]
    assert "b.safetensors" in words(answer)


def test_a_vanished_file_is_refused(webui, jobs, checkpoints):
    (checkpoints / "b.safetensors").unlink()
    answer = start_merge(webui.host(), jobs, *values())
    assert kinds(answer) == ["bad"]
    assert words(answer) == "b.safetensors is no longer there; press Refresh and pick again"
    assert jobs.last is None


def test_a_full_disk_is_reported_with_the_missing_space(host, jobs, root, monkeypatch):
    disk = namedtuple("disk", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk(10**9, 10**9 - 10, 10))
    before = snapshot(root)
    answer = start_merge(host, jobs, *values())
    assert kinds(answer) == ["bad"]
    assert "make room" in words(answer)
    assert jobs.last is None
    assert show_plan(host, Catalogue(), "", *values())[0] == answer
    assert snapshot(root) == before


def test_a_disk_that_fills_meanwhile_is_reported(host, jobs, root, monkeypatch):
    examine, disk = run_preflight, namedtuple("disk", "total used free")

    def then_fill(*arguments):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: disk(10**9, 10**9 - 10, 10))
        return examine(*arguments)

    monkeypatch.setattr("hyper_merge.hosts.tasks.run_preflight", then_fill)
    before = snapshot(root)
    start_merge(host, jobs, *values())
    answer = last_words(jobs)
    assert kinds(answer) == ["bad"]
    assert words(answer).startswith("Failed: ")
    assert "make room" in words(answer)
    assert snapshot(root) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("written", "b.safetensors was changed while being read; run again when nothing writes"),
        ("gone", "b.safetensors does not exist; check the path"),
    ],
)
def test_a_checkpoint_that_changes_is_reported(
    host, jobs, checkpoints, change, message, monkeypatch
):
    examine, path = run_preflight, checkpoints / "b.safetensors"

    def then_change(*arguments):
        preflight = examine(*arguments)
        if change == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-8] + b"\1" * 8)
        return preflight

    monkeypatch.setattr("hyper_merge.hosts.tasks.run_preflight", then_change)
    start_merge(host, jobs, *values())
    answer = last_words(jobs)
    assert kinds(answer) == ["bad"]
    assert words(answer).startswith("Failed: ")
    assert message in words(answer)
    assert not (checkpoints / "mix.safetensors").exists()
    assert not temporaries(checkpoints.parent)


def test_a_warning_is_shown_with_the_outcome(host, jobs):
    start_merge(host, jobs, *values(ranks="40", allocation="even: the same in every layer"))
    answer = last_words(jobs)
    assert kinds(answer) == ["good", "info"]
    assert "rank 40 is capped in " in words(answer)


def test_a_second_click_says_what_is_being_made(host, jobs, endless):
    start_merge(host, jobs, *values())
    until(lambda: endless)
    for answer in (
        start_merge(host, jobs, *values(name="other")),
        start_demo(host, jobs),
    ):
        assert kinds(answer) == ["info"]
        assert words(answer).startswith("mix is still being made (")
    stop_job(jobs)
    ended(jobs)


def test_the_button_stops_a_merge_and_nothing_is_written(host, jobs, root, endless):
    before = snapshot(root)
    start_merge(host, jobs, *values())
    until(lambda: endless)
    following = watch_job(jobs)
    status, button, message = next(following)
    assert unchanged(message)
    assert "mix: " in words(status)
    assert button["interactive"] is True
    assert stop_job(jobs) == ""
    answer, _, message = list(following)[-1]
    assert message == ""
    assert (kinds(answer), words(answer)) == (["info"], "Stopped: no file was changed")
    assert snapshot(root) == before
    assert all(map(unchanged, show_merge_result(host, jobs)))


def test_stop_says_that_nothing_runs(host, jobs):
    assert words(stop_job(jobs)) == "Nothing is running."
    jobs.start("mix", lambda task, progress: "", host.log)
    ended(jobs)
    assert words(stop_job(jobs)) == "Nothing is running."


def test_a_new_page_shows_the_running_or_last_job(host, jobs, endless):
    ((status, button, message),) = watch_job(jobs)
    assert unchanged(message)
    assert (status, button["interactive"]) == ("", False)
    start_merge(host, jobs, *values())
    until(lambda: endless)
    first, second = watch_job(jobs), watch_job(jobs)
    assert next(first)[0].startswith('<div class="hm-progress"')
    assert next(second)[0].startswith('<div class="hm-progress"')
    first.close()
    stop_job(jobs)
    assert kinds(list(second)[-1][0]) == ["info"]
    status, _, message = next(watch_job(jobs))
    assert kinds(status) == ["info"]
    assert unchanged(message)


def test_a_stopping_job_disables_the_stop_button(jobs, monkeypatch):
    now = JobStatus("task(x)", "mix", "solving", 0.5, 8, stopping=True)
    end = JobStatus("task(x)", "mix", outcome="stopped", message="stopped; no file was changed")

    statuses = [now, end]

    class Job:
        wait = staticmethod(lambda seconds: None)
        status = property(lambda self: statuses.pop(0))

    monkeypatch.setattr(jobs, "_known", [Job()])
    (status, button, _), _ = watch_job(jobs)
    assert words(status) == "mix: stopping, 50%, about 10 seconds left"
    assert button["interactive"] is False


def test_an_unexpected_error_is_logged_by_the_app(host, jobs, failing, caplog):
    with caplog.at_level(logging.ERROR):
        start_merge(host, jobs, *values())
        answer = last_words(jobs)
    assert kinds(answer) == ["bad"]
    assert words(answer).endswith(
        "see the log for details: RuntimeError: mat1 and mat2 shapes cannot be multiplied"
    )
    assert "in deep_inside" in caplog.text
    assert "at layer 7" in caplog.text


def test_an_unexpected_error_frees_the_webuis_queue(webui, jobs, failing):
    start_merge(webui.host(), jobs, *values())
    answer = last_words(jobs)
    assert "Traceback" not in answer
    assert "at layer 7" not in answer
    (report,) = webui.errors.reports
    assert "in deep_inside" in report
    assert "at layer 7" in report
    assert not webui.queue_lock.held
    assert webui.progress.answer(jobs.last.status.task)["completed"]


@pytest.mark.parametrize("button", ["interrupt", "skip"])
def test_the_webuis_own_buttons_stop_a_merge(webui, jobs, root, endless, button):
    host, before = webui.host(), snapshot(root)
    start_merge(host, jobs, *values())
    until(lambda: endless)
    task = jobs.last.status.task
    until(lambda: (webui.progress.answer(task)["progress"] or 0) > 0.2)
    assert webui.progress.answer(task)["textinfo"] == "reading the checkpoints"
    getattr(webui.state, button)()
    answer = last_words(jobs)
    assert words(answer) == "Stopped: no file was changed"
    assert snapshot(root) == before
    assert set(host.styles()) == set()
    until(lambda: not webui.queue_lock.held)


def test_the_stop_button_ends_a_merge_in_the_webui(webui, jobs, endless):
    start_merge(webui.host(), jobs, *values())
    until(lambda: endless)
    stop_job(jobs)
    assert words(last_words(jobs)) == "Stopped: no file was changed"
    until(lambda: not webui.queue_lock.held)


def test_a_merge_waits_for_the_webuis_work(webui, jobs, endless):
    with webui.queue_lock:
        start_merge(webui.host(), jobs, *values())
        task = jobs.last.status.task
        until(lambda: webui.progress.answer(task)["queued"])
        status, button, _ = next(watch_job(jobs))
        assert "mix: waiting for the queue, 0%" in words(status)
        assert button["interactive"] is True
        assert endless == []
    until(lambda: endless)
    stop_job(jobs)
    ended(jobs)


def test_stop_ends_a_waiting_merge_at_once(webui, jobs, root, endless):
    before = snapshot(root)
    with webui.queue_lock:
        start_merge(webui.host(), jobs, *values())
        task = jobs.last.status.task
        until(lambda: webui.progress.answer(task)["queued"])
        stop_job(jobs)
        assert words(last_words(jobs)) == "Stopped: no file was changed"
    until(no_thread)
    assert endless == []
    assert not webui.queue_lock.held
    assert webui.progress.pending_tasks == {}
    assert webui.errors.reports == []
    assert snapshot(root) == before


def test_the_webui_lists_hyper_model_loras_and_styles(webui, jobs, checkpoints):
    host = webui.host()
    start_merge(host, jobs, *values())
    assert ended(jobs).message == ""
    assert "mix.safetensors" in host.checkpoints()
    assert set(webui.networks.available_networks) == {"mix_0-4", "mix_1-2"}
    assert set(host.styles()) == {"mix: a", "mix: b", "mix: c"}
    panel = show_merge_result(host, jobs)
    assert panel[11] == host.checkpoint_title(checkpoints / "mix.safetensors") != ""
    assert webui.prompt_styles.styles["mix: a"].prompt == panel[5]
    assert panel[5].startswith("<lora:mix_0-4:")
    assert not webui.queue_lock.held
    assert webui.errors.reports == []


def test_no_style_is_saved_where_the_tick_is_off(webui, jobs, run):
    host = webui.host()
    start_merge(host, jobs, *values(ranks="2", save_styles=False))
    assert ended(jobs).outcome == "done"
    assert set(host.styles()) == set()


def test_unsaved_styles_leave_a_note_after_the_merge(webui, jobs, run):
    host = webui.host()
    webui.prompt_styles.styles["mix-2: b"] = PromptStyle("mix-2: b", "my own words", "")
    start_merge(host, jobs, *values(ranks="2"))
    answer = last_words(jobs)
    assert kinds(answer) == ["good", "info"]
    assert "mix-2: b" in words(answer)
    assert webui.prompt_styles.styles["mix-2: b"].prompt == "my own words"
    assert show_merge_result(host, jobs)[10] == "mix-2"


def test_before_anything_ran_there_is_nothing_to_show(host, jobs):
    assert all(map(unchanged, show_merge_result(host, jobs)))
    assert all(map(unchanged, pick_demo_checkpoints(host, jobs, "")))


def test_the_status_names_the_run_that_is_made(host, jobs, run):
    assert start_merge(host, jobs, *values(ranks="3")) == ""
    assert ended(jobs).outcome == "done"
    assert words(last_words(jobs)).startswith("Done: mix-2, in ")
