"""The faults that hostile files and requests once found, one of each kind."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from hyper_merge.checkpoints.architectures.families.sd1 import SD1
from hyper_merge.checkpoints.architectures.families.sd2 import SD2
from hyper_merge.checkpoints.prediction_type import v_prediction_config
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import CheckpointError, RecipeError, UnknownRunError
from hyper_merge.hosts.standalone import Standalone
from hyper_merge.loras.metadata import Lineage, SourceRecord, checkpoint_metadata
from hyper_merge.loras.reader import LoraReader
from hyper_merge.recipe.loading import load_recipe
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import load_run
from hyper_merge.runtime.checked_json import parse_json

MODULE = "lora_unet_x"


@pytest.mark.parametrize(
    "text",
    ["[" * 3000, "model: !!timestamp x", "model: 2001-12-14 21:59:43 +99999999999:00", "9" * 9999],
)
def test_a_configuration_of_a_host_that_is_damaged_counts_as_none(tmp_path, text, files):
    (tmp_path / "a.yaml").write_text(text)
    path = tmp_path / "a.safetensors"
    path.write_bytes(files[0].read_bytes())
    assert "parameterization" in v_prediction_config(read_header(path), SD2.predicting_v())


@pytest.mark.parametrize(
    "line", ['name: "\\UFFFFFFFF"', "%YAML " + "9" * 5000 + ".1\n---\nname: a"]
)
def test_numbers_beyond_all_measure_are_no_yaml(tmp_path, line):
    (tmp_path / "a.yaml").write_text(line)
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "text", ['{"a": NaN}', '{"a": "\\ud800"}', '{"a":' * 3000 + "0" + "}" * 3000, '{"a": 1e999}']
)
def test_lineage_that_cannot_be_written_again_is_left_out(text):
    metadata = {"sd_merge_models": text, "sd_merge_recipe": text}
    source = SourceRecord("a", "0" * 64, "0" * 8, metadata)
    written = checkpoint_metadata(Lineage("mix", SD1, {}, (source,), "2030"))
    json.dumps(written, ensure_ascii=False).encode()
    assert json.loads(written["sd_merge_models"])["0" * 64]["sd_merge_recipe"] is None


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": torch.ones(2)},
        {"lora_down.weight": torch.tensor(1.0)},
        {"lora_down.weight": torch.ones(2, 3, dtype=torch.int8)},
        {"lora_up.weight": torch.ones(4, 3)},
        {"diff": torch.tensor(1.0)},
    ],
)
def test_factors_that_are_none_are_refused_by_module(tmp_path, changes):
    tensors = {"lora_up.weight": torch.ones(4, 2), "lora_down.weight": torch.ones(2, 3)}
    named = {f"{MODULE}.{key}": tensor for key, tensor in {**tensors, **changes}.items()}
    save_file(named, tmp_path / "x.safetensors")
    with (
        pytest.raises(CheckpointError, match=rf"x\.safetensors .*{MODULE}"),
        LoraReader(tmp_path / "x.safetensors", SD1) as lora,
    ):
        lora.factors(MODULE)


def test_a_module_of_no_part_of_the_family_is_refused(tmp_path):
    tensors = {"other.lora_up.weight": torch.ones(4, 2), "other.lora_down.weight": torch.ones(2, 3)}
    save_file(tensors, tmp_path / "x.safetensors")
    with (
        pytest.raises(CheckpointError, match="other is no module of Stable Diffusion 1"),
        LoraReader(tmp_path / "x.safetensors", SD1),
    ):
        pass


def test_half_of_a_surrogate_pair_is_no_text():
    with pytest.raises(ValueError, match="surrogates not allowed"):
        parse_json('{"name": "\\ud800"}')


def test_names_that_are_not_utf_8_are_neither_listed_nor_merged(tmp_path, files):
    folder = tmp_path / "Stable-diffusion"
    folder.mkdir()
    name = os.fsdecode(b"\xff.safetensors")
    try:
        (folder / name).write_bytes(files[0].read_bytes())
    except OSError:
        pytest.skip("the file system takes no such names")
    assert Standalone(tmp_path).checkpoints() == {}
    with pytest.raises(CheckpointError, match="not valid UTF-8") as refusal:
        read_header(folder / name)
    str(refusal.value).encode()


def test_a_name_too_long_for_a_folder_is_that_of_no_run(tmp_path):
    with pytest.raises(UnknownRunError, match="expected the name of a run"):
        load_run(Folders.under(tmp_path), "x" * 5000)
