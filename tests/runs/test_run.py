"""Earlier runs are read back as they were made, and deleted with what they wrote and nothing else."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_family import merge, recipe, snapshot, temporaries, write

from hyper_merge.errors import OutputError, RunError
from hyper_merge.runs.deletion import delete_run, files_of
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import list_runs, load_run


@pytest.fixture
def folders(started, merged):
    """Those of a merge, with a manifest as if it had been made there."""
    manifest, root = started / "hyper-merge/mix/manifest.json", merged.place.loras.parent
    manifest.write_text(manifest.read_text().replace(str(root), str(started)))
    return Folders.under(started)


@pytest.fixture
def edit(started):
    """Changes the manifest of a run; None takes a key away."""

    def edit(run="mix", **changes):
        path = started / "hyper-merge" / run / "manifest.json"
        manifest = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))

    return edit


def names(paths, root):
    return sorted(path.relative_to(root).as_posix() for path in paths)


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


def test_where_nothing_was_merged_there_are_no_runs(tmp_path):
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
    assert run.recipe == recipe(models, tmp_path, **settings)
    assert run.report.curve == ()


def test_missing_files_do_not_prevent_deleting_the_rest(started, folders):
    run = load_run(folders, "mix")
    run.hyper_model.unlink()
    run.loras[1].unlink()
    loaded = load_run(folders, "mix")
    assert loaded.missing == (run.hyper_model, run.loras[1])
    removed = delete_run(loaded, folders)
    assert names(removed, started) == [
        "Lora/mix_0-4.json",
        "Lora/mix_0-4.png",
        "Lora/mix_0-4.safetensors",
        "Lora/mix_1-2.json",
        "Lora/mix_1-2.png",
        "hyper-merge/mix/manifest.json",
        "hyper-merge/mix/multipliers.txt",
        "hyper-merge/mix/report.txt",
    ]
    assert [*snapshot(started)] == [f"Stable-diffusion/mix.{end}" for end in ("json", "png")]
    assert not loaded.folder.exists()


@pytest.mark.parametrize("ours", [False, True])
def test_a_replaced_hyper_model_is_missing_and_never_deleted(
    started, folders, files, tmp_path, ours
):
    run = load_run(folders, "mix")
    other = merge(files[:2], tmp_path / "other").place.hyper_model if ours else files[0]
    shutil.copy(other, run.hyper_model)
    loaded = load_run(folders, "mix")
    assert loaded.missing == (run.hyper_model,)
    delete_run(loaded, folders)
    kept = [f"Stable-diffusion/mix.{end}" for end in ("json", "png", "safetensors")]
    assert [*snapshot(started)] == kept


def test_deleting_removes_exactly_the_files_of_the_run(files, started, folders):
    other = merge(files[:2], started, name="other")
    before = snapshot(started)
    run = load_run(folders, "mix")
    listed = files_of(run, folders)
    assert delete_run(run, folders) == listed
    after = snapshot(started)
    assert {name: before[name] for name in after} == after
    assert before.keys() - after.keys() == {name for name in before if "mix" in name}
    assert len(listed) == len(before.keys() - after.keys())
    assert temporaries(started) == []
    assert [loaded.name for loaded in list_runs(folders)[0]] == ["other"]
    assert other.place.hyper_model.exists()
    assert refusal(folders) == f"there is no run mix in {folders.runs}. There are other"
    with pytest.raises(RunError, match="there is no run mix"):
        delete_run(run, folders)


def test_a_hyper_model_stays_while_a_run_needs_it(files, started, folders):
    merge(files, started, ranks=(3,))
    first, second = (load_run(folders, name) for name in ("mix", "mix-2"))
    assert first.hyper_model == second.hyper_model
    assert first.hyper_model not in delete_run(first, folders)
    assert first.hyper_model in delete_run(second, folders)
    assert snapshot(started) == {}


def test_a_hyper_model_stays_while_it_is_a_source(files, started, folders):
    run = load_run(folders, "mix")
    merge([run.hyper_model, files[0]], started, name="of")
    assert run.hyper_model not in files_of(run, folders)
    (of,) = (item for item in list_runs(folders)[0] if item.name == "of")
    assert "of.safetensors" in [path.name for path in delete_run(of, folders)]
    assert run.hyper_model in files_of(run, folders)


def test_a_hyper_model_stays_while_a_run_is_unreadable(files, started, folders):
    merge(files, started, ranks=(3,))
    (started / "hyper-merge/mix-2/manifest.json").write_text("{")
    run = load_run(folders, "mix")
    assert run.hyper_model not in files_of(run, folders)


def test_source_checkpoints_are_never_deleted(files, tmp_path, state_of):
    models = tmp_path / "Stable-diffusion"
    models.mkdir()
    mine = [write(models / f"{name}.safetensors", state_of(c)) for c, name in enumerate("abc")]
    merge(mine[1:], tmp_path, base=str(mine[0]))
    folders = Folders.under(tmp_path)
    delete_run(load_run(folders, "mix"), folders)
    assert names(models.iterdir(), models) == [f"{name}.safetensors" for name in "abc"]


def test_a_manifest_that_points_elsewhere_deletes_nothing_there(started, folders, edit, tmp_path):
    outside = Path(shutil.copy(load_run(folders, "mix").hyper_model, tmp_path / "out.safetensors"))
    (started / "Stable-diffusion/mix.safetensors").unlink()
    edit(hyper_model=str(outside))
    run = load_run(folders, "mix")
    assert run.hyper_model == outside
    assert outside not in delete_run(run, folders)
    assert outside.exists()


def test_somebody_elses_files_stay(started, folders):
    lora = started / "Lora/mix_0-4.safetensors"
    shutil.copy(started / "Lora/mix_1-2.safetensors", lora)  # not the one of this name
    notes = started / "hyper-merge/mix/notes.txt"
    notes.write_text("mine")
    delete_run(load_run(folders, "mix"), folders)
    assert snapshot(started).keys() == {
        "Lora/mix_0-4.json",
        "Lora/mix_0-4.png",
        "Lora/mix_0-4.safetensors",
        "hyper-merge/mix/notes.txt",
    }


def test_a_file_that_cannot_be_removed_keeps_all(started, folders, monkeypatch):
    run, before, rename = load_run(folders, "mix"), snapshot(started), Path.rename

    def refuse(self, target):
        if self.name == "report.txt":
            raise PermissionError(13, "used by another program")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match=r"cannot remove .*report\.txt: used by another program;"):
        delete_run(run, folders)
    assert snapshot(started) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_a_read_only_folder_is_told_and_everything_stays(started, folders):
    run, before = load_run(folders, "mix"), snapshot(started)
    folders.loras.chmod(0o555)
    try:
        with pytest.raises(OutputError, match=r"cannot remove .*see to the rights of its folder"):
            delete_run(run, folders)
    finally:
        folders.loras.chmod(0o755)
    assert snapshot(started) == before


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


def test_a_linked_folder_of_all_runs_is_followed(started, folders, tmp_path):
    folders.runs.rename(tmp_path / "disk")
    folders.runs.symlink_to(tmp_path / "disk", target_is_directory=True)
    assert len(delete_run(load_run(folders, "mix"), folders)) == 12


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


def test_a_renamed_folder_is_told_from_its_run(started, folders):
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
