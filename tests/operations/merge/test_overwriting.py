"""A merge never loses a file that was there, and replaces a run only when asked to."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_family import (
    Stop,
    losses,
    merge,
    recipe,
    snapshot,
    tags_of,
    temporaries,
)

from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.errors import HyperMergeError, OutputError
from hyper_merge.operations.merge.average import run_average
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.runtime.progress import Progress


def test_repeated_recipe_is_refused_unless_overwriting(files, started):
    before = snapshot(started)
    with pytest.raises(OutputError, match="the run mix is this very merge already; choose another"):
        merge(files, started)
    assert snapshot(started) == before
    merge(files, started, overwrite=True, iterations=1)
    after = snapshot(started)
    assert after.keys() == before.keys()
    assert after["Lora/mix_0-4.safetensors"] != before["Lora/mix_0-4.safetensors"]
    assert after["Stable-diffusion/mix.safetensors"] == before["Stable-diffusion/mix.safetensors"]


def test_overwriting_makes_the_average_of_other_checkpoints(files, tmp_path):
    merge(files[:2], tmp_path)
    with pytest.raises(OutputError, match="is not the average of these checkpoints"):
        merge(files, tmp_path)
    merged = merge(files, tmp_path, overwrite=True)
    loss, _ = losses(files, merged, tags_of(merged))
    assert merged.report.loss == pytest.approx(loss, abs=1e-6)


def test_overwriting_removes_the_replaced_runs_loras(files, started):
    before = snapshot(started)
    mine = started / "Lora" / "mix_2-9.safetensors"
    mine.write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        merge(files, started, Stop(1.0, "interrupt").progress, ranks=(4,), overwrite=True)
    mine.unlink()
    assert snapshot(started) == before
    merge(files, started, ranks=(4,), overwrite=True)
    kept = {name for name in before if "mix_1-2" not in name}
    assert snapshot(started).keys() == kept
    assert temporaries(started) == []


def test_overwriting_keeps_foreign_loras(files, started):
    manifest = started / "hyper-merge/mix/manifest.json"
    mine = [
        started / "Lora" / name for name in ("mix_1-2.safetensors", "mix_1-2.json", "mix_2-1.png")
    ]
    for path in mine:
        path.write_text("mine")
    content = json.loads(manifest.read_text())
    outside = Path(
        shutil.copy(started / "Lora/mix_0-4.safetensors", started)
    )  # ours by its content
    content["report"]["loras"] += ["../mix_0-4", "mix_0-4/../../mix_0-4", 7]
    manifest.write_text(json.dumps(content))
    merge(files, started, ranks=(3,), overwrite=True)
    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert outside.exists()
    assert not (started / "Lora/mix_0-4.safetensors").exists()


def test_hyper_model_of_other_runs_is_kept(files, started):
    merge(files, started, ranks=(3,))
    merge(files, started, ranks=(3,), name="other")
    before = snapshot(started)
    message = (
        "mix.safetensors is the hyper-model of the runs {}mix-2, other, and their LoRAs go with no"
        " other; choose another name, or delete the runs first"
    )
    with pytest.raises(OutputError) as caught:
        merge(files[:2], started, overwrite=True)
    assert str(caught.value) == message.format("")
    with pytest.raises(OutputError) as caught:
        run_average(run_preflight(recipe(files[:2], started, overwrite=True)), Progress())
    assert str(caught.value) == message.format("mix, ")  # whose LoRAs would stay
    assert snapshot(started) == before
    hyper_model = started / "Stable-diffusion/mix.safetensors"
    hyper_model.rename(started / "moved.safetensors")
    with pytest.raises(OutputError, match=r"hyper-model of the runs mix-2, other, and their"):
        merge(files[:2], started)
    (started / "moved.safetensors").rename(hyper_model)
    merge(files, started, overwrite=True, iterations=1)  # the same average: they all go with it
    run_average(run_preflight(recipe(files, started, overwrite=True)), Progress())
    assert load_file(hyper_model).keys() == load_file(files[0]).keys()


def test_the_base_of_another_run_is_not_replaced(files, started):
    base = started / "Stable-diffusion/mix.safetensors"
    merge(files[1:], started, name="from", base=str(base))
    with pytest.raises(OutputError, match="hyper-model of the run from, and their LoRAs"):
        merge(files[:2], started, overwrite=True)


def test_merge_on_another_device_is_the_same(files, started):
    with pytest.raises(OutputError, match="the run mix is this very merge already"):
        merge(files, started, device="auto")


@pytest.mark.parametrize(
    "place",
    [
        "Stable-diffusion/mix.safetensors",
        "Lora/mix_1-2.safetensors",
        "Lora/mix_0-4.json",
        "Lora/mix_1-2.png",
    ],
)
def test_name_of_a_foreign_file_is_refused(files, tmp_path, place, monkeypatch):
    mine = tmp_path / place
    mine.parent.mkdir()
    mine.write_text("mine")
    monkeypatch.setattr(CheckpointReader, "__enter__", lambda self: pytest.fail("work was done"))
    with pytest.raises(OutputError) as caught:
        merge(files, tmp_path)
    assert str(mine) in str(caught.value)
    assert "exists" in str(caught.value)
    assert "choose another name, or --overwrite" in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "mine"


def test_folder_of_the_runs_name_is_avoided(files, tmp_path):
    folder = tmp_path / "hyper-merge" / "mix"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    assert merge(files, tmp_path).place.run == "mix-2"


def test_a_checkpoint_of_the_merge_is_never_overwritten(files, tmp_path):
    (tmp_path / "Stable-diffusion").mkdir()
    models = [
        Path(shutil.copy(path, tmp_path / "Stable-diffusion" / path.name)) for path in files[:2]
    ]
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match="one of the files that are read"):
        merge(models, tmp_path, name="a", overwrite=True)
    assert snapshot(tmp_path) == before


def test_other_checkpoints_of_equal_names_make_another_run(files, tmp_path):
    merge(files[1:], tmp_path / "models", base=str(files[0]))
    (tmp_path / "others").mkdir()
    others = [Path(shutil.copy(files[0], tmp_path / "others" / path.name)) for path in files[1:]]
    second = merge([others[0], files[2]], tmp_path / "models", base=str(files[0]))
    assert second.place.run == "mix-2"


def test_users_card_of_a_hyper_model_stays(files, started):
    hyper_model = started / "Stable-diffusion" / "mix.safetensors"
    hyper_model.unlink()
    hyper_model.with_suffix(".png").write_bytes(b"mine")
    merge(files, started, ranks=(3,))
    assert hyper_model.with_suffix(".png").read_bytes() == b"mine"


def test_a_place_that_cannot_be_written_is_named(files, tmp_path):
    blocked = tmp_path / "models"
    blocked.write_text("a file")
    with pytest.raises(HyperMergeError, match="models"):
        merge(files, blocked)
    assert blocked.read_text() == "a file"
