"""Earlier runs: listed, opened, copied, compared, deleted; and the cache."""

from dataclasses import fields

import pytest
from at_the_tab import NAMES, ended, kinds, unchanged, values, words
from tiny_family import snapshot

from hyper_merge import analysis_cache
from hyper_merge.errors import CacheError, OutputError
from hyper_merge.ui import history, merging
from hyper_merge.ui.form import Form

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
    assert (run["value"], other["value"]) == ("mix", "mix-2")
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
def test_of_no_run_nothing_is_copied_compared_asked_or_deleted(host, run, root, name):
    before = snapshot(root)
    *copied, said = history.copy_settings(host, name)
    assert len(copied) == COUNT
    assert all(map(unchanged, copied))
    assert kinds(said) == ["bad"]
    assert kinds(history.compare(host, "mix", name)) == ["bad"]
    for handler in (history.ask_to_delete, history.delete):
        said, confirm, cancel = handler(host, name)
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


def test_deleting_asks_first_and_names_every_file(host, run, root):
    before = snapshot(root)
    said, confirm, cancel = history.ask_to_delete(host, run)
    assert snapshot(root) == before
    assert confirm["visible"] is cancel["visible"] is True
    gone = {name for name in before if "mix" in name}
    assert all(str(root / name) in words(said) for name in gone)
    assert words(said).startswith(f"Deleting the run mix removes these {len(gone)} files:")
    said, confirm, cancel = history.delete(host, run)
    assert (kinds(said), words(said)) == (["good"], f"{len(gone)} files of mix are deleted.")
    assert confirm["visible"] is cancel["visible"] is False
    assert snapshot(root).keys() == before.keys() - gone
    assert list(host.checkpoints()) == NAMES


def test_keeping_them_deletes_nothing(host, run, root):
    before = snapshot(root)
    said, confirm, cancel = history.keep()
    assert said == ""
    assert confirm["visible"] is cancel["visible"] is False
    assert snapshot(root) == before


def test_a_run_that_cannot_be_deleted_is_said(host, run, monkeypatch):
    def refuse(*arguments):
        raise OutputError("mix_0-4.safetensors cannot be removed; close what has it open")

    monkeypatch.setattr(history, "delete_run", refuse)
    said, confirm, _ = history.delete(host, run)
    assert kinds(said) == ["bad"]
    assert words(said).endswith("close what has it open")
    assert confirm["visible"] is False


def test_after_deleting_the_webuis_lists_are_without_them(webui, run):
    host = webui.host()
    host.refresh()
    assert "mix.safetensors" in host.checkpoints()
    history.delete(host, run)
    assert "mix.safetensors" not in host.checkpoints()
    assert not webui.networks.available_networks


def test_the_cache_is_cleared_and_says_what_that_freed(host, run, root):
    held = analysis_cache.total_bytes(root / "hyper-merge/cache")
    assert held > 0
    said = history.clear_cache(host)
    assert kinds(said) == ["good"]
    assert f"{round(held / 1e6)} MB are free again" in words(said)
    assert analysis_cache.total_bytes(root / "hyper-merge/cache") == 0
    assert "The cache holds 0 kB of at most 21.47 GB" in words(history.cache_text(host.folders()))


def test_a_cache_that_cannot_be_cleared_is_said(host, monkeypatch):
    def refuse(folder):
        raise CacheError("part of the cache cannot be deleted; try again later")

    monkeypatch.setattr(history.analysis_cache, "clear", refuse)
    said = history.clear_cache(host)
    assert (kinds(said), words(said)) == (
        ["bad"],
        "part of the cache cannot be deleted; try again later",
    )
