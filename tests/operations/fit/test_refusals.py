"""What cannot be fitted is refused by name with nothing written."""

import json

import pytest
import torch
from fitting import FIT, fit
from safetensors.torch import load_file, save_file
from tiny_family import QUERY, WarningLog, snapshot, write, write_unfinished

from hyper_merge.errors import (
    CheckpointError,
    MismatchError,
    NameTakenError,
    NonFiniteError,
    OutputError,
    RecipeError,
    RunError,
)
from hyper_merge.operations.fit.fit import run_fit
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.runtime.progress import Progress


def edit_tensor(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def newer(path):
    path.write_text(path.read_text().replace('"version": 1', '"version": 99', 1))


def replaced(path):
    tensors = load_file(path)
    save_file(tensors, path)  # the same tensors, without the metadata


HYPER = "Stable-diffusion/mix.safetensors"
LORA = "Lora/mix_1-2.safetensors"
REFUSED = [
    (HYPER, lambda path: path.unlink(), "the hyper-model of the run mix, is missing"),
    (HYPER, replaced, "is not the hyper-model that the LoRAs of the run mix go with"),
    (LORA, lambda path: path.unlink(), r"mix_1-2.safetensors of the run mix is missing"),
    (LORA, edit_tensor, "mix_1-2.safetensors was edited or replaced since the run mix"),
    ("hyper-merge/mix/manifest.json", newer, "was made by Hyper-Merge .*; update"),
]


@pytest.mark.parametrize(("name", "act", "message"), REFUSED)
def test_an_incomplete_run_is_refused_with_nothing_written(at, other, started, name, act, message):
    act(started / name)
    before = snapshot(started)
    with pytest.raises(RunError, match=message):
        fit(at, other, topup="3")
    assert snapshot(started) == before


def test_a_link_instead_of_the_fits_is_refused(at, other, started, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (started / FIT).symlink_to(elsewhere, target_is_directory=True)
    before = snapshot(started)
    with pytest.raises(OutputError, match="fits is a link, and links are not followed"):
        fit(at, other, overwrite=True)
    assert list(elsewhere.iterdir()) == []
    assert snapshot(started) == before


def test_an_edited_lora_is_refused_without_hashes_too(at, other, started):
    path = started / "hyper-merge/mix/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]
    path.write_text(json.dumps(manifest))
    fit(at, other)
    edit_tensor(started / LORA)
    with pytest.raises(RunError, match=r"mix_1-2\.safetensors was edited or replaced"):
        fit(at, other, name="again")


def test_unknown_runs_and_files_are_refused(at, other, started, tmp_path):
    before = snapshot(started)
    with pytest.raises(RunError, match=r'there is no run mxi in .*did you mean "mix"'):
        run_fit(FitRequest("mxi", other), at, Progress())
    with pytest.raises(CheckpointError, match=r"nowhere.safetensors does not exist"):
        fit(at, tmp_path / "nowhere.safetensors")
    with pytest.raises(RecipeError, match=r"is not allowed"):
        fit(at, other, name="a/b")
    assert snapshot(started) == before


def test_another_family_is_refused(at, started, tmp_path, state_of):
    state = {key: tensor for key, tensor in state_of(0).items() if "first_stage" not in key}
    lacking = write(tmp_path / "lacking.safetensors", state)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    wide = {**state_of(0), key: torch.zeros(state_of(0)[key].shape[0], 9, 3, 3).half()}
    inpainting = write(tmp_path / "inpainting.safetensors", wide)
    before = snapshot(started)
    with pytest.raises(MismatchError, match=r"1 is Stable Diffusion 1.x.*inpainting"):
        fit(at, inpainting)
    with pytest.raises(MismatchError, match=r"VAE.*choose files with the same parts"):
        fit(at, lacking)
    assert snapshot(started) == before


def test_a_spoilt_checkpoint_is_refused_by_key(at, started, tmp_path, state_of):
    state = state_of(0)
    state[QUERY] = state[QUERY].clone()
    state[QUERY][0, 0] = float("nan")
    before = snapshot(started)
    with pytest.raises(NonFiniteError, match=r"spoilt.safetensors holds NaN or infinity in 1 of"):
        fit(at, write(tmp_path / "spoilt.safetensors", state))
    assert snapshot(started) == before


def test_another_file_of_a_merged_name_is_refused(at, other, started):
    twin = other.with_name("a.safetensors")
    other.rename(twin)
    before = snapshot(started)
    with pytest.raises(
        NameTakenError, match="a is another checkpoint of the run mix; choose another"
    ):
        fit(at, twin)
    assert snapshot(started) == before
    assert fit(at, twin, name="mine").row.name == "mine"


def test_an_unfinished_download_cannot_be_fitted(at, other, started, tmp_path):
    spoilt = write_unfinished(tmp_path / "spoilt.safetensors", other, 0.6)
    before = snapshot(started)
    with pytest.raises(CheckpointError, match=r"spoilt\.safetensors lacks data"):
        fit(at, spoilt)
    sign = other.with_name(other.name + ".part")
    sign.touch()
    with pytest.raises(CheckpointError, match=r"the download of new one\.safetensors is not"):
        fit(at, other)
    assert snapshot(started) == before
    log = WarningLog()
    assert fit(at, other, log.progress, damaged="accept").row.name == other.stem
    assert log.warnings == [
        "the download of new one.safetensors is not finished: new one.safetensors.part stands beside it"
    ]
    assert fit(at, spoilt, damaged="accept").row.name == "spoilt"
