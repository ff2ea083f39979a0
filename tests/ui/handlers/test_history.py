"""Earlier runs: listed, opened, copied, compared, deleted; and the cache."""

import threading
from dataclasses import fields

import pytest
from at_the_tab import NAMES, ended, kinds, unchanged, values, words
from tiny_family import snapshot

from hyper_merge.analysis import cache as analysis_cache
from hyper_merge.errors import CacheError, OutputError
from hyper_merge.hosts.job_queue import Jobs
from hyper_merge.ui.form import Form
from hyper_merge.ui.handlers import history
from hyper_merge.ui.handlers import merge as merging
from hyper_merge.ui.handlers import result as results

COUNT = len(fields(Form))
NO_RUNS = [None, "", "gone", "../mix", "/etc", "mix/../mix"]


@pytest.fixture
def two(host, run, jobs):
    """Names of two runs."""
    merging.start(host, jobs, *values(ranks="3"))
    assert ended(jobs).message == ""
    return "mix-2", "mix"


def test_runs_are_listed_newest_first_with_the_first_two_to_compare(host, two):
    table, run, other, cache = history.runs(host, None, None)
    assert words(table).index("mix-2") < words(table).index("4, 2")
    assert run["choices"] == other["choices"] == ["mix-2", "mix"]
    assert (run["value"], other["value"]) == ("mix-2", "mix")
    assert "The cache holds " in words(cache)


def test_what_is_picked_stays_unless_it_is_gone(host, two):
    _, run, other, _ = history.runs(host, "mix", "mix-2")
    assert "value" not in {**run, **other}, "it may have been picked anew since the page asked"
    _, run, other, _ = history.runs(host, "gone", "gone")
    assert (run["value"], other["value"]) == ("mix-2", "mix")


def test_where_nothing_was_merged_the_list_says_so(host):
    table, run, other, _ = history.runs(host, "mix", None)
    assert words(table) == "No merge was made here yet."
    assert run["choices"] == []
    assert run["value"] is other["value"] is None


def test_one_run_has_nothing_to_be_compared_with(host, run):
    _, first, second, _ = history.runs(host, None, None)
    assert (first["value"], second["value"]) == ("mix", None)


def test_a_damaged_run_is_named_among_the_others(host, two, root):
    (root / "hyper-merge/mix/manifest.json").write_text("{")
    table, run, _, _ = history.runs(host, None, None)
    assert kinds(table) == ["bad"]
    assert "the run mix cannot be read" in words(table)
    assert run["choices"] == ["mix-2"]


def test_the_settings_of_a_run_come_back_into_the_form(host, jobs, run):
    *copied, said = history.copy_settings(host, run)
    assert copied == values(save_styles=False)  # the app has none
    assert (kinds(said), words(said)) == (["good"], "The settings of mix are in the form.")
    again = merging.start(host, jobs, *copied)
    assert "this very merge" in words(again)


def test_in_the_webui_the_styles_are_as_its_settings_say(webui, run):
    host = webui.host()
    assert history.copy_settings(host, run)[:COUNT] == tuple(values())
    webui.opts.data["hyper_merge_save_styles"] = False
    assert history.copy_settings(host, run)[COUNT - 1] is False


def test_checkpoints_that_are_gone_are_counted(host, run, checkpoints):
    (checkpoints / "b.safetensors").unlink()
    *copied, said = history.copy_settings(host, run)
    assert copied[0] == ["a.safetensors", "c.safetensors"]
    assert kinds(said) == ["info"]
    assert words(said).endswith("1 of its checkpoints are no longer in the list.")


@pytest.mark.parametrize("name", NO_RUNS)
def test_of_no_run_nothing_is_copied_compared_asked_or_deleted(host, run, root, name, jobs):
    before = snapshot(root)
    *copied, said = history.copy_settings(host, name)
    assert len(copied) == COUNT
    assert all(map(unchanged, copied))
    assert kinds(said) == ["bad"]
    assert kinds(history.compare(host, "mix", name)) == ["bad"]
    for handler in (history.ask_to_delete, history.delete):
        said, confirm, cancel, asked = handler(host, jobs, name)
        assert asked == ""
        assert kinds(said) == ["bad"]
        assert confirm["visible"] is cancel["visible"] is False
    assert snapshot(root) == before


def test_two_runs_stand_side_by_side(host, two):
    text = words(history.compare(host, *two))
    for word in ("mix-2", "4, 2", "Explained, a", "mix.safetensors"):
        assert word in text


def test_checkpoints_of_one_run_only_are_said_to_be_so(host, run, jobs):
    merging.start(host, jobs, *values(name="two", checkpoints=NAMES[:2], ranks="2"))
    assert ended(jobs).message == ""
    text = words(history.compare(host, "mix", "two"))
    assert text.endswith("not in it")
    assert "Explained, c" in text


def test_deleting_asks_first_and_names_every_file(host, run, root, jobs):
    before = snapshot(root)
    said, confirm, cancel, asked = history.ask_to_delete(host, jobs, run)
    assert asked == run
    assert snapshot(root) == before
    assert confirm["visible"] is cancel["visible"] is True
    gone = {name for name in before if "mix" in name}
    assert all(str(root / name) in words(said) for name in gone)
    assert words(said).startswith(f"Deleting the run mix removes these {len(gone)} files:")
    said, confirm, cancel, asked = history.delete(host, jobs, asked)
    assert asked == ""
    assert (kinds(said), words(said)) == (["good"], f"{len(gone)} files of mix are deleted.")
    assert confirm["visible"] is cancel["visible"] is False
    assert snapshot(root).keys() == before.keys() - gone
    assert list(host.checkpoints()) == NAMES


def test_keeping_them_deletes_nothing(host, run, root):
    before = snapshot(root)
    said, confirm, cancel, asked = history.keep()
    assert said == asked == ""
    assert confirm["visible"] is cancel["visible"] is False
    assert snapshot(root) == before


def test_a_run_that_cannot_be_deleted_is_said(host, run, jobs, monkeypatch):
    def refuse(*arguments):
        raise OutputError("mix_0-4.safetensors cannot be removed; close what has it open")

    monkeypatch.setattr(history, "delete_run", refuse)
    said, confirm, *_ = history.delete(host, jobs, run)
    assert kinds(said) == ["bad"]
    assert words(said).endswith("close what has it open")
    assert confirm["visible"] is False


def test_after_deleting_the_webuis_lists_are_without_them(webui, run, jobs):
    host = webui.host()
    host.refresh()
    assert "mix.safetensors" in host.checkpoints()
    history.delete(host, jobs, run)
    assert "mix.safetensors" not in host.checkpoints()
    assert not webui.networks.available_networks


def test_a_runs_styles_go_with_it_and_others_stay(webui, run, jobs):
    host = webui.host()
    results.save_styles(host, run)
    host.save_styles({"other: a": "{prompt} <lora:other_0-4:1.0>"})
    said, *_ = history.ask_to_delete(host, jobs, run)
    assert " files and 3 styles:" in words(said)
    assert len(host.styles()) == 4
    said, *_ = history.delete(host, jobs, run)
    assert kinds(said) == ["good"]
    assert host.styles() == {"other: a"}


def test_styles_that_cannot_be_removed_are_said_beside_what_is_deleted(
    webui, run, jobs, monkeypatch
):
    def refuse(self, names):
        raise OutputError("the WebUI's styles cannot be written")

    monkeypatch.setattr(type(webui.host()), "remove_styles", refuse)
    said, *_ = history.delete(webui.host(), jobs, run)
    assert kinds(said) == ["good", "bad"]
    assert words(said).endswith("the WebUI's styles cannot be written")


def test_while_a_merge_runs_no_run_is_deleted(host, run, root, jobs):
    over = threading.Event()
    jobs.start("mix-2", lambda task, progress: over.wait(60) and "", host.log)
    before = snapshot(root)
    try:
        for handler in (history.ask_to_delete, history.delete):
            said, *_ = handler(host, jobs, run)
            assert words(said).startswith("mix-2 is still being made")
    finally:
        over.set()
    assert ended(jobs).outcome == "done"
    assert snapshot(root) == before
    assert kinds(history.delete(host, jobs, run)[0]) == ["good"]


def test_the_cache_is_cleared_and_says_what_that_freed(host, run, root):
    held = analysis_cache.cache_bytes(root / "hyper-merge/cache")
    assert held > 0
    said = history.clear(host, Jobs())
    assert kinds(said) == ["good"]
    assert f"{round(held / 1e6)} MB are free again" in words(said)
    assert analysis_cache.cache_bytes(root / "hyper-merge/cache") == 0
    assert "The cache holds 0 kB of at most 20.00 GB" in words(history.runs(host, None, None)[3])


def test_a_cache_that_cannot_be_cleared_is_said(host, monkeypatch):
    def refuse(folder):
        raise CacheError("part of the cache cannot be deleted; try again later")

    monkeypatch.setattr(analysis_cache, "clear_analyses", refuse)
    said = history.clear(host, Jobs())
    assert (kinds(said), words(said)) == (
        ["bad"],
        "part of the cache cannot be deleted; try again later",
    )
