"""A models folder that version 0.1.0 made: a run, a fit with a private LoRA, the cache, a recipe."""

import functools
import json
import os
import zipfile
from pathlib import Path

import pytest
from tiny_family import merge, snapshot

from hyper_merge.operations.deletable import find_deletable
from hyper_merge.operations.fit.fit import run_fit
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.restore.request import RestoreRequest
from hyper_merge.operations.restore.restore import run_restore
from hyper_merge.recipe.loading import load_recipe
from hyper_merge.recipe.parsing import parse_private_lora_target
from hyper_merge.runs.deletion import delete_run
from hyper_merge.runs.fit_records import load_fits
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.manifest import RunManifest
from hyper_merge.runs.run import list_runs, load_run
from hyper_merge.runtime.progress import Progress

ARCHIVE = Path(__file__).parents[1] / "data/run-0.1.0.zip"
ENDS = ("safetensors", "json")  # of a LoRA or hyper-model and its card
MADE_IN = "/home/user/webui"  # in the records
MODIFIED = 1_700_000_000  # seconds; the checkpoints' times are part of the cache's keys


@pytest.fixture
def webui(tmp_path):
    """The folder, with records as if it had been made here."""
    root = tmp_path / "webui"
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(root)
    for checkpoint in (root / "checkpoints").iterdir():
        os.utime(checkpoint, (MODIFIED, MODIFIED))
    runs = root / "models/hyper-merge"
    for path in (runs / "mix/manifest.json", runs / "mix/fits/d.json", runs / "cache/hashes.json"):
        path.write_text(path.read_text().replace(MADE_IN, str(root)))
    return root


@pytest.fixture
def folders(webui):
    return Folders.under(webui / "models")


@pytest.fixture
def manifest(folders):
    """The manifest as it was written, plain data."""
    return json.loads((folders.runs / "mix/manifest.json").read_text())


@pytest.fixture
def fit(folders):
    """The record of the fit as it was written, plain data."""
    return json.loads((folders.runs / "mix/fits/d.json").read_text())["fit"]


def checkpoints(webui, names):
    return tuple(webui / f"checkpoints/{name}.safetensors" for name in names)


def plain(record):
    return json.loads(json.dumps(record))


def as_now(report):
    """Returns an earlier report with the figures that it lacks as unknown."""
    rows = [{**row, "explained_weighted": 0.0} for row in report["checkpoints"]]
    known = {name: value for name, value in report.items() if name != "relative_loss"}
    unknown = {"weighted_private_loss": 0.0, "weighted_bound": 0.0, "shared_fidelity": []}
    weighted = {"metric": "relative", "weighted_loss": report["relative_loss"], **unknown}
    return {**known, "checkpoints": rows, **weighted}


def test_the_run_is_listed_with_its_figures(webui, folders, manifest):
    (run,), problems = list_runs(folders)
    assert problems == []
    assert (run.name, run.created, run.family) == (
        "mix",
        manifest["created"],
        "Stable Diffusion 1.x",
    )
    assert plain(run.report.as_dict()) == as_now(manifest["report"])
    assert (run.missing, run.problems) == ((), ())
    assert run.hyper_model == folders.models / "mix.safetensors"
    assert [path.name for path in run.loras] == ["mix_0-4.safetensors", "mix_1-2.safetensors"]
    assert dict(run.hashes) == manifest["files"]
    assert tuple(source.path for source in run.sources) == checkpoints(webui, "abc")
    assert run.recipe.to_settings() == manifest["settings"] | {
        "damaged": "refuse",
        "block_weights": None,
        "memory": None,
        "training": 0,
    }


def test_the_manifest_is_written_as_it_was(manifest):
    data = RunManifest.from_json(manifest).to_json() | {"hyper_merge": manifest["hyper_merge"]}
    expected = {**manifest, "report": as_now(manifest["report"])}
    assert list(data) == list(expected)
    assert plain(data) == expected


def test_the_fit_record_loads_with_its_private_lora(folders, fit):
    run = load_run(folders, "mix")
    (record,), problems = load_fits(run)
    assert problems == ()
    assert list(record.row.multipliers) == fit["row"]["multipliers"]
    assert record.explained == fit["topups"][0]["explained"]
    text = (folders.runs / "mix/fits/d.txt").read_text()
    assert text.splitlines()[-1] == record.tags(run)


def test_the_recipe_file_is_that_of_the_run(webui, folders, monkeypatch):
    monkeypatch.chdir(webui)
    recipe = load_recipe(webui / "recipe.yaml")
    settings = load_run(folders, "mix").recipe.to_settings()
    assert (settings["exact"], settings["layer_weights"]) == ("none", "relative")
    assert recipe.to_settings() == settings | {
        "exact": "auto",
        "layer_weights": "output",
        "lora_dtype": "auto",
        "damaged": "refuse",
    }  # now


def test_other_ranks_use_the_old_hyper_model(webui, folders):
    before = snapshot(folders.models)
    merged = merge(checkpoints(webui, "abc"), webui / "models", ranks=(3, 2))
    assert not merged.reused_analysis  # it has other layers
    assert merged.place.exists
    assert merged.place.run == "mix-2"
    assert merged.place.hyper_model == folders.models / "mix.safetensors"
    assert snapshot(folders.models) == before
    assert {run.name for run in list_runs(folders)[0]} == {"mix", "mix-2"}


def test_a_restored_checkpoint_has_the_reported_error(folders):
    restored = run_restore(RestoreRequest("mix", {"a": 1.0}), folders, Progress())
    row = load_run(folders, "mix").report.checkpoints[0]
    assert restored.path == folders.models / "a-restored.safetensors"
    assert restored.problem == ""
    assert restored.compared.reported == row.explained
    # float16 is rounded once more, in the sum
    assert restored.compared.explained == pytest.approx(row.explained, abs=1e-4)


def test_fitting_again_gives_the_recorded_multipliers(webui, folders, fit):
    (path,) = checkpoints(webui, "d")
    topup = parse_private_lora_target("50%")
    request = FitRequest("mix", path, topup=topup, device="cpu", overwrite=True)
    record = run_fit(request, folders, Progress())
    near = functools.partial(pytest.approx, rel=1e-6)  # another processor sums in another order
    assert record.row.multipliers == near(fit["row"]["multipliers"])
    assert record.row.text_multipliers == near(fit["row"]["text_multipliers"])
    assert record.row.explained == near(fit["row"]["explained"])
    (lora,), (recorded,) = record.topups, fit["topups"]
    assert (lora.name, lora.rank) == (recorded["name"], recorded["rank"])
    assert 0.5 <= record.fidelity < 0.6  # the recorded one counted plain differences
    assert load_fits(load_run(folders, "mix")) == ((record,), ())


def test_originals_are_deletable_as_far_as_they_are_restored(folders, manifest, fit):
    report = find_deletable("mix", 0.9, folders, Progress())
    assert report.problem == ""
    rows = [*manifest["report"]["checkpoints"], {**fit["row"], **fit["topups"][0], "name": "d"}]
    shares = {row["name"]: row["explained"] * (1 - row["not_carried"]) for row in rows}
    verdicts = {verdict.restored_as: verdict for verdict in report.verdicts}
    assert {name: verdict.everything for name, verdict in verdicts.items()} == shares
    assert [name for name, verdict in verdicts.items() if verdict.safe] == ["b"]
    assert report.frees == verdicts["b"].path.stat().st_size


def test_deleting_the_run_removes_its_files_alone(webui, folders):
    checkpoint = webui / "models/Stable-diffusion/other.safetensors"
    checkpoint.write_bytes(checkpoints(webui, "a")[0].read_bytes())
    files = {path for path in webui.rglob("*") if path.is_file()}
    removed = delete_run(load_run(folders, "mix"), folders)
    assert {path.relative_to(folders.models.parent).as_posix() for path in removed} == {
        *(f"Lora/mix_{lora}.{end}" for lora in ("0-4", "1-2", "fit-d-1") for end in ENDS),
        *(f"Stable-diffusion/mix.{end}" for end in ENDS),
        *(f"hyper-merge/mix/{name}" for name in ("manifest.json", "multipliers.txt", "report.txt")),
        *(f"hyper-merge/mix/fits/d.{end}" for end in ("json", "txt")),
    }
    assert {path for path in webui.rglob("*") if path.is_file()} == files - set(removed)
    assert not (folders.runs / "mix").exists()
