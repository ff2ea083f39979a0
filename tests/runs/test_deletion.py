"""Runs are deleted with the files that they wrote and nothing else."""

import os
import shutil
from pathlib import Path

import pytest
from tiny_family import merge, snapshot, temporaries, write

from hyper_merge.errors import OutputError, RunError
from hyper_merge.runs.deletion import delete_run, files_of
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import list_runs, load_run


def names(paths, root):
    return sorted(path.relative_to(root).as_posix() for path in paths)


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
    with pytest.raises(RunError) as caught:
        load_run(folders, "mix")
    assert str(caught.value) == f"there is no run mix in {folders.runs}. There are other"
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
    (child,) = (item for item in list_runs(folders)[0] if item.name == "of")
    assert "of.safetensors" in [path.name for path in delete_run(child, folders)]
    assert run.hyper_model in files_of(run, folders)


def test_a_hyper_model_stays_while_it_is_a_source_in_a_moved_folder(
    files, started, folders, tmp_path
):
    merge([load_run(folders, "mix").hyper_model, files[0]], started, name="of")
    there = Folders.under(started.rename(tmp_path / "moved"))
    run = load_run(there, "mix")
    assert run.hyper_model not in files_of(run, there)
    assert load_run(there, "of").sources[0].path == there.models / "mix.safetensors"
    delete_run(load_run(there, "of"), there)
    assert run.hyper_model in files_of(run, there)


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
    run, before, replace = load_run(folders, "mix"), snapshot(started), Path.replace

    def refuse(self, target):
        if self.name == "report.txt":
            raise PermissionError(13, "used by another program")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match=r"cannot remove .*report\.txt: used by another program;"):
        delete_run(run, folders)
    assert snapshot(started) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_a_read_only_folder_is_reported_and_everything_stays(started, folders):
    run, before = load_run(folders, "mix"), snapshot(started)
    folders.loras.chmod(0o555)
    try:
        with pytest.raises(OutputError, match=r"cannot remove .*see to the rights of its folder"):
            delete_run(run, folders)
    finally:
        folders.loras.chmod(0o755)
    assert snapshot(started) == before


def test_a_linked_folder_of_all_runs_is_followed(started, folders, tmp_path):
    folders.runs.rename(tmp_path / "disk")
    folders.runs.symlink_to(tmp_path / "disk", target_is_directory=True)
    assert len(delete_run(load_run(folders, "mix"), folders)) == 12
