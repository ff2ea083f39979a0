"""A LoRA whose download was not finished is refused by every command, unless it is asked for."""

import shutil

import pytest
import torch
from lora_files import KEY, OUT, QUERY, factors, kohya, write, write_lora
from safetensors.torch import load_file
from tiny_family import snapshot, write_unfinished

from hyper_merge.cli.main import REFUSED, SUCCESS, main
from hyper_merge.operations.loras.inputs import read_loras

LAYERS = (QUERY, KEY, OUT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a whole LoRA, one that ends in zeros, and one with a download beside it."""
    place = tmp_path_factory.mktemp("unfinished")
    whole = write_lora(place / "whole.safetensors", 1, modules=LAYERS)
    write_lora(place / "other.safetensors", 2, modules=LAYERS)
    write_unfinished(place / "cut.safetensors", whole, 0.5)
    shutil.copy(whole, place / "loading.safetensors")
    (place / "loading.safetensors.aria2").touch()
    words = ["--name", "mix", "--ranks", "2", "--iterations", "1", "--create"]
    files = [str(whole), str(place / "other.safetensors")]
    assert main(["loras", *files, *words, "--output", str(place / "models")]) == SUCCESS
    return place


COMMANDS = {
    "loras": ["loras", "BAD", "other", "--ranks", "2", "--iterations", "1", "--output", "models"],
    "resize": ["resize", "BAD", "--rank", "1", "--to", "new"],
    "combine": ["combine", "other", "BAD", "--to", "new"],
    "fit": ["fit", "mix", "BAD", "--output", "models"],
}


@pytest.mark.parametrize("bad", ["cut", "loading"])
@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_refused_unless_asked_for(folder, tmp_path, capsys, bad, command):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    names = {"BAD": bad, "other": "other", "new": "new"}
    words = [
        str(tmp_path / f"{names[word]}.safetensors") if word in names else word
        for word in COMMANDS[command]
    ]
    words = [str(tmp_path / word) if word == "models" else word for word in words]
    before = snapshot(tmp_path)
    assert main(words) == REFUSED
    said = capsys.readouterr().err
    assert f"{bad}.safetensors" in said
    assert "set damaged to accept" in said or "download" in said
    assert snapshot(tmp_path) == before
    assert main([*words, "--damaged", "accept"]) == SUCCESS
    assert ("cut.safetensors lacks data" in capsys.readouterr().err) == (bad == "cut")


def test_it_is_not_added_to_a_checkpoint(tmp_path, files, capsys):
    weight = load_file(files[0])[
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    ]
    ends = {"up": torch.zeros(len(weight), 2), "down": torch.zeros(2, weight.shape[1])}
    lora = write(
        tmp_path / "cut.safetensors", {f"{KEY}.lora_{end}.weight": x for end, x in ends.items()}
    )
    words = ["add", str(files[0]), str(lora), "--to", str(tmp_path / "new.safetensors")]
    assert main(words) == REFUSED
    assert f"nothing but zeros in {KEY}" in capsys.readouterr().err
    assert main([*words, "--damaged", "accept"]) == SUCCESS


def test_what_trainers_and_editors_leave_blank_is_taken(tmp_path):
    state = kohya(factors(3, 1, LAYERS))
    state[f"{KEY}.lora_up.weight"].zero_()  # untrained
    state[f"{OUT}.lora_up.weight"].zero_()  # switched off
    state[f"{OUT}.lora_down.weight"].zero_()
    path = write(tmp_path / "a.safetensors", state)
    assert list(load_file(path))[-1] == f"{KEY}.lora_up.weight"  # which ends the file
    assert not read_loras([path]).warnings
