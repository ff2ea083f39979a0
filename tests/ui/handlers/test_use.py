"""The tab "Use" between jobs: which run it shows, its sliders, what a job has left to show."""

import html
import json
import re
from dataclasses import replace

import pytest
from at_the_tab import EVIL, kinds, tags, unchanged, words

from hyper_merge.hosts.job_queue import MERGE, JobStatus
from hyper_merge.operations.fit.fit import run_fit
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.recipe.parsing import PrivateLoraTarget
from hyper_merge.runs.run import load_run
from hyper_merge.runs.weighted_loras import mixture_tags
from hyper_merge.runtime.progress import Progress
from hyper_merge.ui.handlers.merge import show_merge_result
from hyper_merge.ui.handlers.result import prompts_of, show_run
from hyper_merge.ui.handlers.use import (
    PanelOutcome,
    choose_used_run,
    hide_fit_tags,
    list_usable_runs,
    save_fit_style,
    show_outcome,
    use_run,
    watch_job_in_both_tabs,
)
from hyper_merge.ui.html.common import format_job_status
from hyper_merge.ui.html.use import format_sliders


class One:
    """Jobs of which the last one has a given status."""

    def __init__(self, **status):
        self.last = self
        self.status = JobStatus("task(1)", "the fit of d", **status)

    def wait(self, seconds):
        assert self.status.outcome == "running", "it has ended"
        self.status = replace(self.status, outcome="done", result=PanelOutcome("<p>here</p>"))


@pytest.fixture
def fitted(host, run, files, tmp_path):
    """A checkpoint under another name, fitted onto the run."""
    request = FitRequest(run, files[1], name="later", device="cpu", topup=PrivateLoraTarget(1))
    return run_fit(request, host.folders(), Progress())


def terms_in(sliders):
    """Returns the multipliers that go with the sliders."""
    return json.loads(html.unescape(re.search('data-terms="([^"]*)"', sliders)[1]))


def listing(host, name=None, known="", restored=None, exported=(), picks=(None,) * 3):
    names = ("run", "known", "about", "sliders", "title", "restored", "exported", "fitted")
    updates = list_usable_runs(host, name, known, restored, exported, *picks)
    assert len(updates) == 10
    return dict(zip(names, updates, strict=False))


def test_a_missing_run_says_where_to_make_one(host):
    updates = listing(host)
    assert updates["run"]["choices"] == []
    assert updates["run"]["value"] is None
    assert "There are no runs yet" in words(updates["about"])
    assert updates["sliders"] == ""
    assert updates["fitted"]["choices"] == ["a.safetensors", "b.safetensors", "c.safetensors"]


def test_merged_and_fitted_checkpoints_have_sliders(host, run, fitted):
    updates = listing(host, run)
    assert updates["run"]["value"] == run
    assert re.findall('data-name="([^"]*)"', updates["sliders"]) == ["a", "b", "c", "later"]
    assert (updates["restored"]["choices"], updates["restored"]["value"]) == (
        ["a", "b", "c", "later"],
        "a",
    )
    assert updates["exported"]["choices"] == ["a", "b", "c"]
    assert "and later (fitted later)" in words(updates["about"])


def test_multipliers_of_sliders_add_up_to_tags(host, run, fitted):
    loaded = load_run(host.folders(), run)
    terms = terms_in(format_sliders(loaded))
    for name, prompt in prompts_of(loaded).items():
        assert mixture_tags(loaded, {name: 1.0}) == prompt
        loras = [lora for lora, *_ in terms[name]]
        assert loras == re.findall("<lora:([^:]*):", prompt)
    assert terms["later"][-1] == [fitted.topups[0].name, 1.0, None]
    shares = {"a": 0.3, "later": -0.2, "b": 0}
    mixed = mixture_tags(loaded, shares)
    first = [share * terms[name][0][1] for name, share in shares.items() if share]
    assert mixed.startswith("<lora:mix_0-4:")
    assert f"{round(sum(first), 5):.5f}" in mixed.split()[0]
    assert mixed.endswith(":-0.20000>")
    assert mixture_tags(loaded, {"a": 0.0}) == ""


def test_a_mixture_names_no_lora_that_adds_nothing(host, run):
    loaded = load_run(host.folders(), run)
    row = loaded.report.checkpoints[0]
    text = row.text_multipliers and (0.0, *row.text_multipliers[1:])
    row = replace(row, multipliers=(0.0, *row.multipliers[1:]), text_multipliers=text)
    loaded = replace(loaded, report=replace(loaded.report, checkpoints=(row,)))
    assert len(row.multipliers) == 2
    assert re.findall("<lora:([^:]*)", mixture_tags(loaded, {row.name: 0.5})) == ["mix_1-2"]


def test_names_cannot_break_the_page(host, run, root, monkeypatch):
    monkeypatch.setattr(
        "hyper_merge.ui.html.use.checkpoint_names", lambda run: ('"><img src=x>', "'")
    )
    monkeypatch.setattr("hyper_merge.ui.html.use.tag_rows", lambda run, name: ((EVIL, 1.0, None),))
    sliders = format_sliders(load_run(host.folders(), run))
    assert "img" not in tags(sliders)
    assert terms_in(sliders)['"><img src=x>'] == [[EVIL, 1.0, None]]


def test_a_new_run_is_picked(host, run):
    assert listing(host, run, json.dumps([run]))["run"]["value"] == run
    assert listing(host, "gone", json.dumps(["gone", run]))["run"]["value"] == run
    assert listing(host, "old", json.dumps(["old"]))["run"]["value"] == run


def test_picked_checkpoints_of_a_run_stay_picked(host, run):
    updates = listing(host, run, "", "c", ["b", "gone"])
    assert updates["restored"]["value"] == "c"
    assert updates["exported"]["value"] == ["b"]


def test_a_checkpoint_that_is_gone_is_no_longer_picked(host, run):
    *_, one, two, three = list_usable_runs(host, run, "", None, [], "a.safetensors", "gone", None)
    assert "value" not in one, "it may have changed since the page asked"
    assert two["value"] is three["value"] is None


def test_mix_picks_the_run_of_the_card_and_clears_results_of_another(host, run):
    for shown, cleared in (("other", True), (run, False)):
        updates = use_run(host, run, shown, None, [], None, None, None)
        assert updates[0]["value"] == run
        assert "<input type=range" in updates[3]
        assert (updates[10:16] == ("",) * 6) is cleared
        assert (updates[16] == hide_fit_tags()) is cleared


def test_another_run_clears_earlier_results(host, run):
    about, sliders, *_, group = choose_used_run(host, run, None, [])
    assert "mix.safetensors" in words(about)
    assert sliders.startswith("<div class=hm-mix")
    assert group["visible"] is False


@pytest.mark.parametrize("name", [None, "gone", "../mix"])
def test_a_vanished_run_is_reported(host, run, name):
    about, sliders, *rest = choose_used_run(host, name, None, [])
    assert kinds(about) == ["bad"]
    assert sliders == ""
    assert len(rest) == 10


def test_an_unusable_fit_is_reported(host, run, fitted, root):
    (root / "hyper-merge/mix/fits/later.json").write_text("{}")
    assert kinds(listing(host, run)["about"]) == ["bad"]
    assert "later" not in listing(host, run)["sliders"]


def test_an_outcome_is_shown_in_its_panel():
    jobs = One(outcome="done", result=PanelOutcome("<p>here</p>", wrote=True), place="export")
    *texts, group, content, fitted, title, wrote = show_outcome(jobs)
    assert [text for text in texts if not unchanged(text)] == ["<p>here</p>"]
    assert texts[3] == "<p>here</p>"
    assert wrote == "task(1)"
    assert all(map(unchanged, (group, content, fitted, title)))


def test_tags_of_a_fit_are_shown_and_hidden():
    jobs = One(
        outcome="done",
        result=PanelOutcome("near", "<lora:x:1>", ("mix", "d"), "mix [01]"),
        place="fit",
    )
    *_, group, content, fitted, title, wrote = show_outcome(jobs)
    assert (group["visible"], content, fitted) == (True, "<lora:x:1>", '["mix", "d"]')
    assert title == "mix [01]"
    assert unchanged(wrote)
    refused = One(outcome="refused", message="it is of another family", place="fit")
    texts = show_outcome(refused)
    assert kinds(texts[1]) == ["bad"]
    assert texts[6]["visible"] is False
    assert hide_fit_tags()["visible"] is False


@pytest.mark.parametrize("outcome", ["stopped", "refused", "failed"])
def test_the_outcome_of_a_job_is_in_its_panel(outcome):
    jobs = One(outcome=outcome, message="why", place="safe")
    texts = show_outcome(jobs)
    assert texts[4] == format_job_status(jobs.status)


def test_the_end_of_such_a_job_opens_no_run(host):
    jobs = One(outcome="done", result=PanelOutcome("near"), place="fit")
    assert all(map(unchanged, show_merge_result(host, jobs)[1:]))
    assert all(map(unchanged, show_outcome(One(outcome="done", result="mix"))))


def test_each_tab_says_how_its_own_jobs_ended():
    fit = One(outcome="done", place="fit")
    ((status, _, _, other, *_),) = watch_job_in_both_tabs(fit, None)
    assert status == ""
    assert "Done: the fit of d" in words(other)
    merge = One(outcome="done", place=MERGE)
    ((status, _, _, other, *_),) = watch_job_in_both_tabs(merge, None)
    assert "Done" in words(status)
    assert other == ""
    pictures = One(outcome="refused", message="no sampler", place="compare")
    ((status, _, _, other, *_),) = watch_job_in_both_tabs(pictures, None)
    assert (status, other) == ("", ""), "the tab Compare says it"


def test_progress_is_shown_in_both_tabs_and_panel():
    for panel, is_followed in (("fit", True), ("safe", False)):
        first, *_, panel_text = next(iter(watch_job_in_both_tabs(One(place="fit"), panel)))
        assert "waiting for the queue" in words(first)
        assert (panel_text == first) is is_followed


def test_a_followed_job_ends_with_its_result():
    """Two streams may follow it, and only after one of them the panel is asked what came of it."""
    jobs = One(place="safe")
    *running, ended = (row[-1] for row in watch_job_in_both_tabs(jobs, "safe"))
    assert ["waiting for the queue" in words(text) for text in running] == [True]
    assert ended == "<p>here</p>"
    ((*_, later),) = watch_job_in_both_tabs(jobs, "safe")
    assert unchanged(later)  # a refusal may stand there


def test_a_refusal_changes_nothing_else():
    jobs = One(outcome="done", result="mix", place=MERGE)
    for panel in (None, "fit"):
        (row,) = watch_job_in_both_tabs(jobs, panel, "Ranks: expected a whole number")
        assert all(map(unchanged, row))
        (row,) = watch_job_in_both_tabs(jobs, panel)
        assert row[6] == "task(1)", "whose result is shown then"


def test_the_refusal_by_a_running_job_goes_with_it():
    jobs = One(place=MERGE)
    *running, (*_, task, text) = watch_job_in_both_tabs(jobs, "fit", "it is still being made")
    assert len(running) == 1
    assert all(map(unchanged, running[0][6:]))
    assert (task, text) == ("task(1)", "")


def test_a_run_that_another_page_deleted_is_missed(host, run):
    *_, message = use_run(host, run, run, None, [], None, None, None)
    assert message == ""
    *_, message = use_run(host, "gone", run, None, [], None, None, None)
    assert "there is no run gone" in words(message)


def test_the_style_of_a_fit_is_saved(webui, run, fitted):
    host = webui.host()
    texts = save_fit_style(host, json.dumps([run, "later"]))
    assert (kinds(texts), set(host.styles())) == (["good"], {"mix: later"})
    for nothing in ("", json.dumps([run, "gone"]), json.dumps(["gone", "later"])):
        assert kinds(save_fit_style(host, nothing)) == ["bad"]
    assert set(host.styles()) == {"mix: later"}


def test_fitted_checkpoints_are_in_the_result_too(host, run, fitted):
    content = show_run(host, run)
    assert content[4]["choices"] == ["a", "b", "c", "later"]
