"""Runs whose inputs were LoRAs are listed beside the others, and deleted with what they wrote alone."""

import json
import shutil

import pytest
from lora_files import share, write_related
from tiny_family import merge, snapshot

from hyper_merge.errors import RunError, UnknownRunError
from hyper_merge.runs.deletion import delete_run, files_of
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.lora_runs import list_all_runs, load_any_run, load_lora_run
from hyper_merge.runs.run import list_runs, load_run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A models folder whose LoRAs are shared by one run, with the inputs among them."""
    root = tmp_path_factory.mktemp("made") / "models"
    (root / "Lora").mkdir(parents=True)
    share(write_related(root / "Lora", count=3), root, ranks=(3,), topup="2")
    return root


@pytest.fixture
def root(made, tmp_path):
    """The same, whose files may be changed; the inputs are those of the first."""
    return shutil.copytree(made, tmp_path / "models")


def test_runs_of_both_kinds_are_listed(files, root):
    merge(files[:2], root, name="models")
    folders = Folders.under(root)
    runs, problems = list_all_runs(folders)
    assert [(run.name, run.of_loras) for run in runs] == [("models", False), ("mix", True)]
    assert problems == []
    assert [run.name for run in list_runs(folders)[0]] == ["models"]
    assert load_any_run(folders, "models").hyper_model.name == "models.safetensors"


def test_a_run_of_loras_is_named_where_one_of_checkpoints_is_needed(root):
    folders = Folders.under(root)
    with pytest.raises(UnknownRunError, match="the run mix shares LoRAs"):
        load_run(folders, "mix")
    with pytest.raises(UnknownRunError, match="there is no run other"):
        load_any_run(folders, "other")


def test_a_damaged_one_is_told(root):
    (root / "hyper-merge/mix/loras.json").write_text("{")
    runs, problems = list_all_runs(Folders.under(root))
    assert runs == []
    assert "loras.json is damaged" in problems[0]


def test_deleting_takes_what_the_run_wrote_and_nothing_else(root):
    folders, before = Folders.under(root), snapshot(root)
    (root / "Lora/mix_0-9.safetensors").write_bytes(b"somebody else's")
    run = load_any_run(folders, "mix")
    gone = delete_run(run, folders)
    left = snapshot(root)
    assert {name for name in before if "mix" in name} == before.keys() - left.keys()
    assert len(gone) == len(before.keys() - left.keys())
    assert any("top" in path.name for path in gone)
    assert {name for name in left if name.startswith("Lora/")} == {
        *(f"Lora/lora{c}.safetensors" for c in range(3)),
        "Lora/mix_0-9.safetensors",
    }
    assert not run.folder.exists()
    with pytest.raises(RunError, match="there is no run"):
        delete_run(run, folders)


def test_what_another_run_was_made_of_stays(root):
    folders = Folders.under(root)
    run = load_any_run(folders, "mix")
    shared = run.loras[0]
    share([shared, root / "Lora/lora0.safetensors"], root, name="second", ranks=(2,))
    assert not any(path.stem == shared.stem for path in files_of(run, folders))
    delete_run(run, folders)
    assert shared.exists()
    assert load_any_run(folders, "second").missing == ()


def test_what_another_run_was_made_of_stays_after_the_folder_was_moved(root, tmp_path):
    share([root / "Lora/mix_0-3.safetensors", root / "Lora/lora0.safetensors"], root, name="second")
    folders = Folders.under(root.rename(tmp_path / "moved"))
    gone = {path.name for path in files_of(load_any_run(folders, "mix"), folders)}
    assert "mix_0-3.safetensors" not in gone
    assert any("top" in name for name in gone)


def test_a_lora_of_another_run_that_a_manifest_names_stays(root):
    share([root / f"Lora/lora{c}.safetensors" for c in range(2)], root, name="other", ranks=(2,))
    path = root / "hyper-merge/mix/loras.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["report"]["checkpoints"][0]["topup"] = "other_0-2"
    path.write_text(json.dumps(manifest), encoding="utf-8")
    folders = Folders.under(root)
    assert "other_0-2.safetensors" not in {
        x.name for x in files_of(load_any_run(folders, "mix"), folders)
    }


@pytest.mark.parametrize("name", ["x" * 300, "../mix", "a/b", "", "x\0y"])
def test_what_is_no_name_of_a_folder_is_no_run(tmp_path, name):
    with pytest.raises(UnknownRunError, match="expected the name of a run, which is one of a fold"):
        load_lora_run(Folders.under(tmp_path), name)
