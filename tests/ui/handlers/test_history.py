"""Earlier runs: listed, opened, copied, compared, deleted; and the cache."""

import json
import threading
from dataclasses import fields

import pytest
from at_the_tab import NAMES, ended, kinds, unchanged, values, words
from tiny_family import snapshot

from hyper_merge.analysis.cache import cache_bytes
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import CacheError, OutputError
from hyper_merge.hosts.job_queue import Jobs
from hyper_merge.hosts.standalone import Standalone
from hyper_merge.runs.hash_cache import hash_sources
from hyper_merge.runtime.progress import Progress
from hyper_merge.ui.form import Form
from hyper_merge.ui.handlers import history
from hyper_merge.ui.handlers.merge import start_merge
from hyper_merge.ui.handlers.result import save_run_styles

COUNT = len(fields(Form))
NO_RUNS = [None, "", "gone", "../mix", "/etc", "mix/../mix"]


def move_checkpoint(root, name, to):
    """Moves a checkpoint within a models folder, before its run is made."""
    folder = root / "Stable-diffusion"
    (folder / name).rename(folder / to)
    manifest = root / "hyper-merge/mix/manifest.json"
    text = manifest.read_text().replace(str(folder / name), str(folder / to))
    manifest.write_text(text)


@pytest.fixture
def two(host, run, jobs):
    """Names of two runs."""
    start_merge(host, jobs, *values(ranks="3"))
    assert ended(jobs).message == ""
    return "mix-2", "mix"


def test_runs_are_listed_newest_first(host, two):
    table, run, other, cache = history.list_earlier_runs(host, "", None)
    assert words(table).index("mix-2") < words(table).index("4, 2")
    assert (run, other["choices"], other["value"]) == ("mix-2", ["mix"], "mix")
    assert "The cache holds " in words(cache)


def test_the_picked_run_stays_unless_it_is_gone(host, two):
    _, run, other, _ = history.list_earlier_runs(host, "mix", "mix-2")
    assert unchanged(run), "it may have changed since the page asked"
    assert "value" not in other
    _, run, other, _ = history.list_earlier_runs(host, "gone", "gone")
    assert (run, other["value"]) == ("mix-2", "mix")


def test_an_empty_list_of_runs_says_so(host):
    table, run, other, _ = history.list_earlier_runs(host, "mix", None)
    assert words(table) == "There are no runs yet."
    assert (run, other["choices"], other["value"]) == ("", [], None)


def test_no_run_stands_beside_itself(host, two):
    other = history.list_others(host, "mix", "mix")
    assert (other["choices"], other["value"]) == (["mix-2"], "mix-2")
    for second in ("mix", None):
        answer = history.show_side_by_side(host, "mix", second)
        assert kinds(answer) == ["info"]


def test_a_damaged_run_is_named_among_the_others(host, two, root):
    (root / "hyper-merge/mix/manifest.json").write_text("{")
    table, _, other, _ = history.list_earlier_runs(host, None, None)
    assert kinds(table) == ["bad"]
    assert "the run mix cannot be read" in words(table)
    assert other["choices"] == []


def test_settings_of_a_run_are_copied(host, jobs, run):
    *copied, answer = history.copy_settings(host, run)
    assert copied == values(save_styles=False)  # the app has none
    assert (kinds(answer), words(answer)) == (
        ["good"],
        "The settings of mix were copied to the form.",
    )
    again = start_merge(host, jobs, *copied)
    assert "this very merge" in words(again)


def test_settings_are_copied_after_the_models_folder_was_moved(host, run, root, tmp_path):
    (root / "Stable-diffusion/sub").mkdir()
    move_checkpoint(root, "b.safetensors", "sub/b.safetensors")
    elsewhere = root.rename(tmp_path / "elsewhere")
    *copied, answer = history.copy_settings(Standalone(elsewhere), run)
    assert json.loads(copied[0]) == ["a.safetensors", "sub/b.safetensors", "c.safetensors"]
    assert kinds(answer) == ["good"]


def test_a_renamed_checkpoint_is_found_by_its_content(host, run, checkpoints):
    renamed = checkpoints / "other.safetensors"
    (checkpoints / "b.safetensors").rename(renamed)
    *copied, answer = history.copy_settings(host, run)
    assert kinds(answer) == ["info"], "nobody knows what it holds"
    hash_sources([read_header(renamed)], host.folders().cache, Progress())
    *copied, answer = history.copy_settings(host, run)
    assert json.loads(copied[0]) == ["a.safetensors", "other.safetensors", "c.safetensors"]
    assert kinds(answer) == ["good"]
    renamed.write_bytes(renamed.read_bytes() + b"x")
    *copied, answer = history.copy_settings(host, run)
    assert json.loads(copied[0]) == ["a.safetensors", "c.safetensors"]


def test_the_webuis_setting_decides_about_styles(webui, run):
    host = webui.host()
    assert history.copy_settings(host, run)[:COUNT] == tuple(values())
    webui.opts.data["hyper_merge_save_styles"] = False
    assert history.copy_settings(host, run)[COUNT - 1] is False


def test_checkpoints_that_are_gone_are_counted(host, run, checkpoints):
    (checkpoints / "b.safetensors").unlink()
    *copied, answer = history.copy_settings(host, run)
    assert json.loads(copied[0]) == ["a.safetensors", "c.safetensors"]
    assert kinds(answer) == ["info"]
    assert words(answer).endswith("1 of its checkpoints are no longer in the list.")


@pytest.mark.parametrize("name", NO_RUNS)
def test_nothing_is_done_without_a_run(host, run, root, name, jobs):
    before = snapshot(root)
    *copied, answer = history.copy_settings(host, name)
    assert len(copied) == COUNT
    assert all(map(unchanged, copied))
    assert kinds(answer) == ["bad"]
    assert kinds(history.show_side_by_side(host, name, "mix")) == ["bad"]
    for handler in (history.ask_to_delete_run, history.delete_confirmed_run):
        answer, confirm, cancel, to_delete = handler(host, jobs, name)
        assert to_delete == ""
        if handler is history.ask_to_delete_run or not name:
            assert kinds(answer) == ["bad"]
        assert confirm["visible"] is cancel["visible"] is False
    assert snapshot(root) == before


def test_two_runs_stand_side_by_side(host, two):
    text = words(history.show_side_by_side(host, *two))
    for word in ("mix-2", "4, 2", "Explained, a", "mix.safetensors"):
        assert word in text


def test_checkpoints_of_one_run_only_are_marked(host, run, jobs):
    start_merge(host, jobs, *values(name="two", checkpoints=NAMES[:2], ranks="2"))
    assert ended(jobs).message == ""
    text = words(history.show_side_by_side(host, "mix", "two"))
    assert text.endswith("not included")
    assert "Explained, c" in text


def test_deleting_asks_first_and_names_every_file(host, run, root, jobs):
    before = snapshot(root)
    answer, confirm, cancel, to_delete = history.ask_to_delete_run(host, jobs, run)
    assert to_delete == run
    assert snapshot(root) == before
    assert confirm["visible"] is cancel["visible"] is True
    gone = {name for name in before if "mix" in name}
    assert all(str(root / name) in words(answer) for name in gone)
    assert words(answer).startswith(f"Deleting the run mix removes {len(gone)} files:")
    answer, confirm, cancel, to_delete = history.delete_confirmed_run(host, jobs, to_delete)
    assert to_delete == ""
    assert (kinds(answer), words(answer)) == (["good"], f"Deleted {len(gone)} files of mix.")
    again, *_ = history.delete_confirmed_run(host, jobs, run)
    assert (kinds(again), words(again)) == (["good"], "The run mix is deleted.")
    assert confirm["visible"] is cancel["visible"] is False
    assert snapshot(root).keys() == before.keys() - gone
    assert list(host.checkpoints()) == NAMES


def test_keeping_them_deletes_nothing(host, run, root):
    before = snapshot(root)
    answer, confirm, cancel, to_delete = history.cancel_deletion()
    assert answer == to_delete == ""
    assert confirm["visible"] is cancel["visible"] is False
    assert snapshot(root) == before


def test_a_run_that_cannot_be_deleted_is_reported(host, run, jobs, monkeypatch):
    def refuse(*arguments):
        raise OutputError("mix_0-4.safetensors cannot be removed; close what has it open")

    monkeypatch.setattr(history, "delete_run", refuse)
    answer, confirm, *_ = history.delete_confirmed_run(host, jobs, run)
    assert kinds(answer) == ["bad"]
    assert words(answer).endswith("close what has it open")
    assert confirm["visible"] is False


def test_after_deleting_the_webuis_lists_are_without_them(webui, run, jobs):
    host = webui.host()
    host.refresh()
    assert "mix.safetensors" in host.checkpoints()
    history.delete_confirmed_run(host, jobs, run)
    assert "mix.safetensors" not in host.checkpoints()
    assert not webui.networks.available_networks


def test_a_runs_styles_go_with_it_and_others_stay(webui, run, jobs):
    host = webui.host()
    save_run_styles(host, run)
    host.save_styles({"other: a": "{prompt} <lora:other_0-4:1.0>"})
    answer, *_ = history.ask_to_delete_run(host, jobs, run)
    assert " files and 3 prompt styles:" in words(answer)
    assert len(host.styles()) == 4
    answer, *_ = history.delete_confirmed_run(host, jobs, run)
    assert kinds(answer) == ["good"]
    assert set(host.styles()) == {"other: a"}


def test_styles_that_stay_are_reported_after_deletion(webui, run, jobs, monkeypatch):
    def refuse(self, names):
        raise OutputError("the WebUI's styles cannot be written")

    monkeypatch.setattr(type(webui.host()), "remove_styles", refuse)
    answer, *_ = history.delete_confirmed_run(webui.host(), jobs, run)
    assert kinds(answer) == ["good", "bad"]
    assert words(answer).endswith("the WebUI's styles cannot be written")


def test_while_a_merge_runs_no_run_is_deleted(host, run, root, jobs):
    over = threading.Event()
    jobs.start("mix-2", lambda task, progress: over.wait(60) and "", host.log)
    before = snapshot(root)
    try:
        for handler in (history.ask_to_delete_run, history.delete_confirmed_run):
            answer, *_ = handler(host, jobs, run)
            assert words(answer).startswith("mix-2 is still being made")
    finally:
        over.set()
    assert ended(jobs).outcome == "done"
    assert snapshot(root) == before
    assert kinds(history.delete_confirmed_run(host, jobs, run)[0]) == ["good"]


def test_the_cache_is_cleared_and_says_what_that_freed(host, run, root):
    held = cache_bytes(root / "hyper-merge/cache")
    assert held > 0
    answer = history.clear_idle_cache(host, Jobs())
    assert kinds(answer) == ["good"]
    assert f"{round(held / 1e6)} MB are free again" in words(answer)
    assert cache_bytes(root / "hyper-merge/cache") == 0
    assert "The cache holds 0 kB of at most 20.00 GB" in words(
        history.list_earlier_runs(host, None, None)[3]
    )


def test_a_cache_that_cannot_be_cleared_is_reported(host, monkeypatch):
    def refuse(folder):
        raise CacheError("part of the cache cannot be deleted; try again later")

    monkeypatch.setattr("hyper_merge.operations.cache.clear_analyses", refuse)
    answer = history.clear_idle_cache(host, Jobs())
    assert (kinds(answer), words(answer)) == (
        ["bad"],
        "part of the cache cannot be deleted; try again later",
    )
