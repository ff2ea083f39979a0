"""Earlier runs are read back as they were made, and damaged ones are named."""

import json
from dataclasses import replace

import pytest
from tiny_family import merge, recipe, snapshot

from hyper_merge.errors import RunError
from hyper_merge.runs.deletion import delete_run
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import list_runs, load_run


def refusal(folders, name="mix"):
    with pytest.raises(RunError) as caught:
        load_run(folders, name)
    return str(caught.value)


def test_a_run_is_what_was_merged(files, started, folders, merged):
    run = load_run(folders, "mix")
    assert (run.name, run.folder) == ("mix", started / "hyper-merge/mix")
    assert run.family == "Stable Diffusion 1.x"
    assert run.report == merged.report
    assert run.hyper_model == started / "Stable-diffusion/mix.safetensors"
    assert [path.name for path in run.loras] == ["mix_0-4.safetensors", "mix_1-2.safetensors"]
    assert run.missing == ()
    assert [source.path for source in run.sources] == list(files)
    assert [source.name for source in run.sources] == [path.name for path in files]
    assert all(len(s.sha256) == 64 and len(s.legacy_hash) == 8 for s in run.sources)
    assert run.recipe == recipe(files, started)


def test_runs_are_listed_newest_first(files, started, folders, edit):
    merge(files, started, ranks=(3,))
    merge(files, started, ranks=(2,))
    for run, created in (
        ("mix", "2026-01-02T03:04:05+02:00"),
        ("mix-2", "2026-01-02T03:04:05+00:00"),
        ("mix-3", "2025-12-31T03:04:05+00:00"),
    ):
        edit(run, created=created)
    runs, problems = list_runs(folders)
    assert [run.name for run in runs] == ["mix-2", "mix", "mix-3"]
    assert problems == []


def test_a_new_folder_has_no_runs(tmp_path):
    assert list_runs(Folders.under(tmp_path / "nowhere")) == ([], [])
    (tmp_path / "hyper-merge" / "empty").mkdir(parents=True)
    assert list_runs(Folders.under(tmp_path)) == ([], [])
    (tmp_path / "file").write_text("")
    for folder in ("empty", "file"):
        with pytest.raises(RunError, match=r"there is no run mix in .*look at the list of runs"):
            load_run(Folders.under(tmp_path / folder), "mix")


def test_a_run_names_its_base_and_sources(files, tmp_path):
    merge(files[1:], tmp_path, base=str(files[0]), weights=(1, 3))
    run = load_run(Folders.under(tmp_path), "mix")
    assert run.hyper_model == files[0]
    assert run.sources[0].path == files[0]
    assert run.recipe.models == files[1:]
    assert run.recipe.base == str(files[0])


@pytest.mark.parametrize("based", [False, True])
def test_first_version_manifests_have_settings_as_texts(files, tmp_path, based, monkeypatch):
    settings = {"base": str(files[0])} if based else {"weights": (1, 2, 4), "method": "greedy"}
    models = files[based:]
    merge(models, tmp_path, **settings)
    path = tmp_path / "hyper-merge/mix/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["settings"]
    known = {"name", "models", "ranks", "device", "dtype", "iterations", "tolerance", "weights"}
    known |= {"base", "seed", "method", "vae"}
    manifest["recipe"] = {key: text for key, text in manifest["recipe"].items() if key in known}
    for key in ("curve", "similarity", "parts"):
        del manifest["report"][key]
    path.write_text(json.dumps(manifest))
    run = load_run(Folders.under(tmp_path), "mix")
    assert run.recipe == recipe(models, tmp_path, lora_dtype="auto", **settings)
    assert run.report.curve == ()


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../mix",
        "mix/",
        "a/../mix",
        "a\\mix",
        "/etc",
        "C:mix",
        "mix\0",
        "mix\n",
        ".mix",
    ],
)
def test_a_name_that_is_a_path_is_refused(folders, name):
    assert refusal(folders, name).startswith("expected the name of a run, which is one of a folder")


def test_a_linked_run_is_refused_and_its_target_stays(files, started, folders, tmp_path):
    outside = tmp_path / "outside"
    (started / "hyper-merge/mix").rename(outside)
    link = started / "hyper-merge/mix"
    link.symlink_to(outside, target_is_directory=True)
    message = refusal(folders)
    assert message.startswith(f"the run mix is a link to {outside}, and links are not followed; ")
    assert list_runs(folders) == ([], [message])
    link.unlink()
    outside.rename(link)
    run = load_run(folders, "mix")
    link.rename(outside)
    link.symlink_to(outside, target_is_directory=True)
    before = snapshot(outside)
    with pytest.raises(RunError, match="is a link"):
        delete_run(run, folders)
    assert snapshot(outside) == before
    link.unlink()
    link.symlink_to(link)
    assert "is a link" in refusal(folders)


def test_a_newer_manifest_is_named_and_not_touched(started, folders, edit):
    edit(version=2, hyper_merge="9.9.9", sources="of another form")
    message = refusal(folders)
    assert message.startswith("the run mix was made by Hyper-Merge 9.9.9, this is ")
    assert message.endswith("; update Hyper-Merge to open or delete it")
    assert list_runs(folders) == ([], [message])


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"a": 1}', "\xff", "[" * 100_000])
def test_an_invalid_manifest_is_named_and_hides_no_run(files, started, folders, content):
    merge(files, started, ranks=(3,))
    (started / "hyper-merge/mix/manifest.json").write_bytes(content.encode("latin-1"))
    runs, problems = list_runs(folders)
    assert [run.name for run in runs] == ["mix-2"]
    assert problems == [refusal(folders)]
    folder = started / "hyper-merge/mix"
    assert problems[0].startswith(
        f"the run mix cannot be read: manifest.json in {folder} is damaged ("
    )
    assert problems[0].endswith(
        "; copy it back from a backup, or delete that folder and the run's LoRAs by hand"
    )


SPOILT = {
    "version": ("1", None, 1.5),
    "name": ("mix-2", None, 7),
    "created": ("yesterday", None, "2026-01-02T03:04:05"),
    "family": (None, 3),
    "settings": ({}, [], {"name": "mix", "models": ["a", "b"], "colour": 1}, {"name": "mix"}),
    "sources": (None, {}, [], ["a"], [{"path": "a"}], [{"path": 1}]),
    "report": (None, {}, []),
    "hyper_model": (),
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in SPOILT.items() for v in vs])
def test_every_damage_of_a_manifest_is_one_message(folders, edit, key, value):
    edit(**{key: value})
    assert "is damaged (" in refusal(folders)


@pytest.mark.parametrize("value", [None, "", 7, "a\0b", "x" * 5000, "../../etc/passwd"])
def test_a_hyper_model_without_a_sensible_name_is_missing(folders, edit, value):
    edit(hyper_model=value)
    run = load_run(folders, "mix")
    assert run.hyper_model in run.missing
    assert all(folders.models not in path.parents for path in delete_run(run, folders))


def test_more_or_fewer_sources_than_checkpoints_are_damage(started, folders, edit):
    path = started / "hyper-merge/mix/manifest.json"
    sources = json.loads(path.read_text())["sources"]
    for wrong in (sources[:-1], [*sources, sources[0]]):
        edit(sources=wrong)
        assert "its sources are those of another run" in refusal(folders)


def test_loras_that_are_not_the_runs_own_are_damage(folders, edit, merged):
    report = merged.report.as_dict()
    edit(report=report | {"loras": ["../../x_0-4", "mix_1-2"]})
    assert "its report is that of another run" in refusal(folders)
    edit(report=report | {"checkpoints": report["checkpoints"][:1]})
    assert "is damaged (" in refusal(folders)


def test_a_renamed_folder_is_distinguished_from_its_run(started, folders):
    (started / "hyper-merge/mix").rename(started / "hyper-merge/mine")
    assert "it is that of the run mix: was the folder renamed?" in refusal(folders, "mine")


def test_a_family_of_later_times_keeps_its_name(folders, edit):
    edit(family="sd9")
    assert load_run(folders, "mix").family == "sd9"


def test_a_moved_models_folder_is_found_again(started, folders, tmp_path):
    started.rename(tmp_path / "moved")
    there = Folders.under(tmp_path / "moved")
    run = load_run(there, "mix")
    assert run.hyper_model == tmp_path / "moved/Stable-diffusion/mix.safetensors"
    assert run.missing == ()
    elsewhere = replace(there, models=tmp_path / "nowhere")
    assert load_run(elsewhere, "mix").missing == (tmp_path / "nowhere/mix.safetensors",)
