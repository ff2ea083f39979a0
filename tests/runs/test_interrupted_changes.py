"""What a killed process has left of a run is undone at the next look; unreadable files end no run by halves."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from killed_transactions import killed_after
from tiny_family import merge, snapshot

from hyper_merge.checkpoints.io.temporary_names import temporary_path
from hyper_merge.errors import OutputError
from hyper_merge.runs import ownership
from hyper_merge.runs.deletion import delete_run
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.name_locks import Hold, held
from hyper_merge.runs.run import list_runs, load_run
from hyper_merge.runtime import file_lock


@pytest.mark.parametrize("steps", [1, 6, 11])
@pytest.mark.parametrize("how", ["list", "load"])
def test_a_half_deleted_run_is_whole_at_the_next_look(started, folders, steps, how):
    before = snapshot(started)
    with killed_after(steps):
        delete_run(load_run(folders, "mix"), folders)
    assert before.items() - snapshot(started).items()
    (run,) = list_runs(folders)[0] if how == "list" else [load_run(folders, "mix")]
    assert run.missing == ()
    assert before.items() <= snapshot(started).items()


def test_a_half_replaced_run_is_the_old_one_again(started, folders, files):
    before = snapshot(started)
    with killed_after(4):
        merge(files[::-1], started, ranks=(3,), overwrite=True)
    (run,) = list_runs(folders)[0]
    assert run.missing == ()
    assert before.items() <= snapshot(started).items()


def test_a_folder_that_a_kill_left_takes_no_name(started, folders, files):
    delete_run(load_run(folders, "mix"), folders)
    folder = folders.runs / "mix"
    folder.mkdir()
    temporary_path(folder / "_", ".tmp").touch()
    assert merge(files, started).place.run == "mix"


def test_locks_of_killed_processes_go_and_others_stay(folders):
    stale = folders.runs / ".old.run.lock"
    stale.touch()
    with held(folders.runs, Hold("run", "new")):
        list_runs(folders)
        assert [path.name for path in folders.runs.glob(".*.lock")] == [".new.run.lock"]


@pytest.mark.parametrize(
    "name", ["Lora/mix_0-4.safetensors", "Stable-diffusion/mix.safetensors", "fits/a.json"]
)
def test_a_run_with_an_unreadable_file_is_deleted_by_no_halves(started, folders, monkeypatch, name):
    record = started / "hyper-merge/mix/fits/a.json"
    record.parent.mkdir()
    record.write_text('{"fit": {"topups": []}}')
    monkeypatch.setattr(file_lock, "_MOMENT", 0.0)
    run, before, read = load_run(folders, "mix"), snapshot(started), Path.open

    def refuse(self, *arguments, **options):
        if str(self).endswith(name):
            raise PermissionError(13, "in use", str(self))
        return read(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(OutputError, match=r"cannot be read now \(in use\)"):
            delete_run(run, folders)
    assert snapshot(started) == before
    assert record in delete_run(run, folders)
    assert os.listdir(started / "Lora") == []  # noqa: PTH208


@pytest.mark.parametrize(("code", "is_missing"), [(123, True), (362, False)])  # name; cloud folder
def test_only_a_name_that_windows_refuses_means_no_file(tmp_path, monkeypatch, code, is_missing):
    error = OSError(22, "refused")
    error.winerror = code

    def refuse(path):
        raise error

    monkeypatch.setattr(ownership, "read_json", refuse)
    with nullcontext() if is_missing else pytest.raises(OutputError, match="cannot be read now"):
        assert ownership.known_json(tmp_path / "a?b.json") is None


def test_a_run_that_is_deleted_while_runs_are_listed_is_left_out(tmp_path, monkeypatch):
    folders = Folders.under(tmp_path)
    gone = folders.runs / "gone"
    gone.mkdir(parents=True)
    scandir = os.scandir

    def just_too_late(path):
        if path == gone:
            gone.rmdir()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", just_too_late)
    assert folders.manifests() == []
