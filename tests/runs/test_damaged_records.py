"""Damaged records of runs, fits and comparisons: told by name, never a traceback, no other is lost."""

import json
import random
from contextlib import suppress

import pytest
from mutations import mutations
from PIL import Image
from tiny_family import merge, recipe

from hyper_merge.errors import HyperMergeError, RunError
from hyper_merge.operations.compare.records import (
    ComparisonFigures,
    ComparisonRecord,
    comparison_paths,
    load_comparison,
    save_comparison,
)
from hyper_merge.operations.compare.request import PictureSettings
from hyper_merge.operations.fit.fit import run_fit
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.fit.text import format_fit
from hyper_merge.runs.deletion import files_of
from hyper_merge.runs.fit_records import load_fits
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.report_text import format_report
from hyper_merge.runs.run import list_runs, load_run
from hyper_merge.runtime.progress import Progress

TRIED = 120  # manifests; thousands were tried once


@pytest.fixture
def folders(started):
    return Folders.under(started)


def with_all_of_it(folders, run):
    """Reads all that lists and pages take from a run."""
    files_of(run, folders)
    format_report(run.report)
    load_fits(run)


def test_a_damaged_manifest_is_reported_and_hides_no_run(files, started, folders):
    merge(files, started, name="other", ranks=(3,))
    path, new = folders.runs / "mix/manifest.json", recipe(files, started, name="new")
    texts = mutations(json.loads(path.read_text()))
    assert len(texts) > 2000
    messages = 0
    for damaged in random.Random(0).sample(texts, TRIED):
        path.write_text(damaged)
        runs, problems = list_runs(folders)
        assert "other" in [run.name for run in runs], damaged[:200]
        assert len(runs) + len(problems) == 2
        messages += len(problems)
        for problem in problems:
            assert "the run mix" in problem
            assert str(path.parent) in problem
        for run in runs:
            with_all_of_it(folders, run)
        folders.lora_files_of("mix")
        folders.lora_owners()
        with suppress(HyperMergeError):
            folders.place(new, "an average")
    assert messages > TRIED / 2


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest: manifest["report"].update(loss=10**400),
        lambda manifest: manifest["report"].update(bytes_before=10**400),
        lambda manifest: manifest["report"]["checkpoints"][0].update(explained=-(10**400)),
        lambda manifest: manifest["settings"].update(tolerance=10**400),
        lambda manifest: manifest["settings"].update(budget=10**400),
        lambda manifest: manifest["settings"].update(budget="9" * 400 + " GB"),
    ],
)
def test_numbers_beyond_all_measure_are_reported(folders, edit):
    path = folders.runs / "mix/manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"manifest\.json in .*mix is damaged \("):
        load_run(folders, "mix")


def test_a_private_lora_whose_name_no_prompt_can_hold_is_reported(files, folders):
    run_fit(FitRequest("mix", files[0], name="one"), folders, Progress())
    run = load_run(folders, "mix")
    path = run.folder / "fits/one.json"
    record = json.loads(path.read_text())
    lora = {"name": "x<b>", "rank": 1, "explained": 1.0, "size": 1, "sha256": "0" * 64}
    record["fit"]["topups"] = [lora]
    path.write_text(json.dumps(record))
    fits, problems = load_fits(run)
    assert fits == ()
    assert "expected a name without : < >" in problems[0]
    path = run.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["report"]["checkpoints"][0]["topup"] = "x<b>"
    path.write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="expected a name without : < >"):
        load_run(folders, "mix")


def test_checkpoints_that_are_no_list_stop_nobody_else(folders):
    path = folders.runs / "mix/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["report"]["checkpoints"] = True
    path.write_text(json.dumps(manifest))
    assert "x" not in folders.lora_owners()
    assert folders.lora_files_of("mix") != []


def test_hosts_that_are_unknown_are_shown_by_their_name(folders):
    path = folders.runs / "mix/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["report"]["rounding"][0]["hosts"] = "Another"
    path.write_text(json.dumps(manifest))
    assert "  Another  " in format_report(load_run(folders, "mix").report)


def test_a_damaged_fit_is_reported_and_hides_no_other(files, folders):
    for name in ("one", "two"):
        run_fit(FitRequest("mix", files[0], name=name), folders, Progress())
    run = load_run(folders, "mix")
    path = run.folder / "fits/one.json"
    for damaged in mutations(json.loads(path.read_text())):
        path.write_text(damaged)
        fits, problems = load_fits(run)
        assert "two" in [item.row.name for item in fits]
        assert len(fits) + len(problems) == 2
        assert all("the fit one " in problem for problem in problems)
        for item in fits:
            format_fit(item, run)
        folders.fit_files_of("mix")


def test_a_damaged_comparison_is_reported(folders):
    run = load_run(folders, "mix")
    settings = PictureSettings(("a cat",), seeds=(1, 2**32 - 1))
    figures = (ComparisonFigures("a", "a cat", 1, {"restored": 1.5}, {}),)
    record = ComparisonRecord(
        "mix", "comparison-1", run.created, "a test", "mix", settings, {"a": "x"}, {}, (), figures
    )
    save_comparison(run, record, Image.new("RGB", (8, 8)))
    _, path = comparison_paths(run, "comparison-1")
    assert load_comparison(run, "comparison-1") == record
    messages = []
    for damaged in mutations(json.loads(path.read_text())):
        path.write_text(damaged)
        try:
            load_comparison(run, "comparison-1")
        except RunError as error:
            messages.append(str(error))
    assert len(messages) > 200
    assert all(str(path) in item and item.endswith("; compare again") for item in messages)
