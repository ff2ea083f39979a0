"""What follows a merge, begun in the tab: done as a job, or refused with nothing written."""

import json
import shutil
import threading

import pytest
from at_the_tab import ended, kinds, words
from tiny_family import snapshot, write

from hyper_merge.runs.fit_records import load_fits
from hyper_merge.runs.run import load_run
from hyper_merge.runs.weighted_loras import mixture_tags
from hyper_merge.ui.handlers.merge import show_merge_result, stop_job
from hyper_merge.ui.handlers.use import SAME_PRECISION, PanelOutcome, show_outcome
from hyper_merge.ui.handlers.use_actions import (
    start_deletable_check,
    start_export,
    start_extension,
    start_extraction,
    start_fit,
    start_mixture,
    start_restore,
)
from hyper_merge.ui.html.common import format_percent

FIT = {
    "run": "mix",
    "checkpoint": "new/d.safetensors",
    "topup": "",
    "name": "",
    "replace": False,
    "damaged": False,
}


@pytest.fixture(autouse=True)
def _new(checkpoints, run):
    """Returns a checkpoint that is not in the run."""
    (checkpoints / "new").mkdir()
    shutil.copy(checkpoints / "b.safetensors", checkpoints / "new/d.safetensors")


def outcome(jobs, answer):
    """Returns the outcome of a job that was begun."""
    assert answer == ""
    status = ended(jobs)
    assert status.outcome == "done", status.message
    return status.result


def fit(host, jobs, **changes):
    return start_fit(host, jobs, *(FIT | changes).values())


def test_a_fit_gives_share_sections_and_tags(host, jobs, root):
    result = outcome(jobs, fit(host, jobs))
    assert "d: the LoRAs of mix explain" in words(result.html)
    assert "Largest losses" in words(result.html)
    assert result.tags == mixture_tags(load_run(host.folders(), "mix"), {"d": 1.0})
    assert (result.fitted, result.wrote) == (("mix", "d"), False)
    assert jobs.last.status.place == "fit"
    assert (root / "hyper-merge/mix/fits/d.json").exists()


def test_a_fit_names_its_private_lora_and_share(host, jobs, root):
    result = outcome(jobs, fit(host, jobs, topup="2", name="other"))
    fits, _ = load_fits(load_run(host.folders(), "mix"))
    (record,) = (record for record in fits if record.row.name == "other")
    assert "With its private LoRA mix_fit-other-2 (rank 2" in words(result.html)
    assert f"): {format_percent(record.fidelity)}." in words(result.html)
    assert record.fidelity > record.row.fidelity
    assert result.wrote is True
    assert (root / "Lora/mix_fit-other-2.safetensors").exists()


def test_an_earlier_fit_is_replaced_on_request(host, jobs):
    outcome(jobs, fit(host, jobs))
    assert fit(host, jobs) == ""
    assert ended(jobs).outcome == "refused"
    assert "exists" in jobs.last.status.message
    outcome(jobs, fit(host, jobs, replace=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": None}, "Pick a run"),
        ({"run": "gone"}, "there is no run gone"),
        ({"run": "../mix"}, "expected the name of a run"),
        ({"checkpoint": None}, "Checkpoint: pick a checkpoint."),
        ({"checkpoint": "../a.safetensors"}, "../a.safetensors is no longer in the list"),
        ({"checkpoint": "/etc/passwd"}, "/etc/passwd is no longer in the list"),
        ({"topup": "many"}, "Private LoRA: expected a rank from 1"),
        ({"name": "a/b"}, "Name: the path separator"),
    ],
)
def test_a_fit_with_invalid_fields_is_refused(host, jobs, root, changes, message):
    before = snapshot(root)
    answer = fit(host, jobs, **changes)
    assert kinds(answer) == ["bad"]
    assert words(answer).startswith(message)
    assert jobs.last is None
    assert snapshot(root) == before


def test_an_edited_lora_is_refused_in_the_panel(host, jobs, root):
    path = root / "Lora/mix_1-2.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"\x01\x02")
    before = snapshot(root / "hyper-merge/mix")
    assert fit(host, jobs) == ""
    assert ended(jobs).outcome == "refused"
    assert "was edited or replaced" in words(show_outcome(jobs)[1])
    assert snapshot(root / "hyper-merge/mix") == before


def test_an_extended_run_opens_in_the_result(host, jobs, checkpoints, state_of):
    state = {k: v * 1.01 if v.is_floating_point() else v for k, v in state_of(2).items()}
    write(checkpoints / "e.safetensors", state)
    made = outcome(jobs, start_extension(host, jobs, "mix", "e.safetensors", ""))
    assert made == "mix+1"
    assert [row.name for row in load_run(host.folders(), made).report.checkpoints] == list("abce")
    assert show_merge_result(host, jobs)[10] == made
    assert "Done: mix with e.safetensors" in words(show_outcome(jobs)[1])


def test_a_checkpoint_is_restored_and_compared(host, jobs, checkpoints):
    answer = start_restore(host, jobs, "mix", "b", "float32", "")
    result = outcome(jobs, answer)
    assert "Written: b-restored.safetensors in " in words(result.html)
    assert "float32" in words(result.html)
    assert "Compared with the original" in words(result.html)
    assert (checkpoints / "b-restored.safetensors").exists()
    assert result.wrote is True


def test_a_restored_checkpoint_without_original_is_not_compared(host, jobs, checkpoints, root):
    for copy in ("b", "new/d"):
        (checkpoints / f"{copy}.safetensors").unlink()
    (root / "hyper-merge/cache/hashes.json").unlink()  # of the files elsewhere
    answer = start_restore(host, jobs, "mix", "b", SAME_PRECISION, "again")
    result = outcome(jobs, answer)
    assert "Not compared with an original: b.safetensors is not there" in words(result.html)
    assert (checkpoints / "again.safetensors").exists()


def test_no_file_is_replaced_by_a_restored_one(host, jobs, checkpoints):
    before = snapshot(checkpoints)
    for name in ("a", "mix"):
        assert start_restore(host, jobs, "mix", "b", SAME_PRECISION, name) == ""
        assert ended(jobs).outcome == "refused"
    answer = start_restore(host, jobs, "mix", "b", SAME_PRECISION, "../out")
    assert words(answer).startswith("Name: the path separator")
    answer = start_restore(host, jobs, "mix", "b", "int8", "x")
    assert words(answer).startswith("Precision: expected")
    assert "Pick the checkpoint" in words(
        start_restore(host, jobs, "mix", None, SAME_PRECISION, "")
    )
    assert snapshot(checkpoints) == before


def test_a_mixture_is_written(host, jobs, checkpoints):
    shares = json.dumps({"a": 0.5, "b": 0.25, "c": 0})
    result = outcome(jobs, start_mixture(host, jobs, "mix", shares, "half"))
    assert "The shares add up to 0.75; the hyper-model has the rest, 0.25." in words(result.html)
    assert "a mixture has no original" in words(result.html)
    assert (checkpoints / "half.safetensors").exists()
    assert jobs.last.status.place == "mix"


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ("", "All sliders are at 0"),
        ('{"a": 0}', "All sliders are at 0"),
        ("[1]", "Mix: expected a number"),
        ('{"a": "much"}', "Mix: expected a number"),
        ("no", "Mix: expected a number"),
        ('{"a": 1e999}', "Mix: expected one checkpoint or more, with finite shares"),
    ],
)
def test_a_mixture_of_nothing_is_refused(host, jobs, shares, message):
    answer = start_mixture(host, jobs, "mix", shares, "")
    assert kinds(answer) == ["bad"]
    assert words(answer).startswith(message)
    assert jobs.last is None


def test_a_mixture_of_unknown_names_is_refused(host, jobs, checkpoints):
    before = snapshot(checkpoints)
    assert start_mixture(host, jobs, "mix", '{"../a": 1}', "") == ""
    assert ended(jobs).outcome == "refused"
    assert "has no checkpoint ../a" in jobs.last.status.message
    assert snapshot(checkpoints) == before


def test_one_lora_for_each_checkpoint_or_for_some(host, jobs, root):
    result = outcome(jobs, start_export(host, jobs, "mix", [], "", False))
    assert "3 LoRAs written" in words(result.html)
    assert (root / "Lora/mix_c.safetensors").exists()
    some = outcome(jobs, start_export(host, jobs, "mix", ["b"], "2", True))
    assert "1 LoRA written" in words(some.html)
    assert "which cutting ranks costs" in words(some.html)
    answer = start_export(host, jobs, "mix", ["b"], "many", True)
    assert words(answer).startswith("Rank: expected a whole number")


def test_the_deletion_check_deletes_nothing(host, jobs, checkpoints):
    before = snapshot(checkpoints)
    result = outcome(jobs, start_deletable_check(host, jobs, "mix", "1%"))
    assert "Yes: the run restores at least 1 %" in words(result.html)
    assert "Nothing was deleted" in words(result.html)
    assert result.wrote is False
    strict = outcome(jobs, start_deletable_check(host, jobs, "mix", ""))
    assert "less than 99% is restored" in words(strict.html)
    assert snapshot(checkpoints) == before
    assert words(start_deletable_check(host, jobs, "mix", "200%")).startswith("Threshold: expected")


def test_an_extracted_lora_is_in_the_hosts_folder(webui, jobs, root):
    host = webui.host()
    answer = start_extraction(host, jobs, "a.safetensors", "c.safetensors", "4", "", False)
    result = outcome(jobs, answer)
    assert "Written: c-from-a.safetensors" in words(result.html)
    assert "<lora:c-from-a:1.00000>" in words(result.html)
    assert (host.folders().loras / "c-from-a.safetensors").exists()
    assert "c-from-a" in webui.networks.available_networks


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((None, "c.safetensors", "4", ""), "From: pick"),
        (("a.safetensors", "gone", "4", ""), "gone is no longer in the list"),
        (("a.safetensors", "c.safetensors", "", ""), "Rank: expected"),
        (("a.safetensors", "c.safetensors", "4", "a/b"), "Name: the path separator"),
    ],
)
def test_an_extraction_of_what_is_not_there_is_refused(host, jobs, fields, message):
    answer = start_extraction(host, jobs, *fields, False)
    assert kinds(answer) == ["bad"]
    assert words(answer).startswith(message)


def test_files_that_look_damaged_are_taken_on_request(host, jobs, checkpoints):
    (checkpoints / "new/d.safetensors.part").touch()
    pair = ("a.safetensors", "new/d.safetensors", "4", "")
    for start, done in (
        (lambda damaged: start_extraction(host, jobs, *pair, damaged), "Written"),
        (lambda damaged: fit(host, jobs, damaged=damaged), "the LoRAs of mix explain"),
    ):
        assert start(False) == ""
        assert "is not finished" in ended(jobs).message
        assert done in words(outcome(jobs, start(True)).html)


def test_a_run_of_that_name_keeps_its_loras(host, jobs, root):
    before = snapshot(root / "Lora")
    answer = start_extraction(host, jobs, "a.safetensors", "c.safetensors", "4", "mix_0-4", False)
    assert answer == ""
    assert ended(jobs).outcome == "refused"
    assert "is a LoRA of the run mix" in jobs.last.status.message
    assert snapshot(root / "Lora") == before


def test_one_job_at_a_time(host, jobs):
    over = threading.Event()
    jobs.start("mix", lambda task, progress: over.wait(60), host.log)
    answer = fit(host, jobs)
    over.set()
    assert kinds(answer) == ["info"]
    assert "mix is still being made" in words(answer)


def test_a_fit_waits_for_the_webui_and_stops(webui, jobs, root):
    host = webui.host()
    before = snapshot(root)
    with webui.queue_lock:
        assert fit(host, jobs) == ""
        stop_job(jobs)
        assert ended(jobs).outcome == "stopped"
    assert snapshot(root) == before
    assert not isinstance(jobs.last.status.result, PanelOutcome)
