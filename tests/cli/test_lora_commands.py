"""The commands on LoRAs write what they say, and refuse with a message and exit code 2."""

import pytest
from lora_files import QUERY, kohya, write, write_lora
from safetensors.torch import load_file

from hyper_merge.cli.main import REFUSED, SUCCESS, main


@pytest.fixture
def loras(tmp_path):
    return [
        str(write_lora(tmp_path / f"{name}.safetensors", seed)) for seed, name in enumerate("ab")
    ]


def test_loras_are_shared_and_one_more_fitted(tmp_path, loras, capsys):
    output = str(tmp_path / "models")
    words = ["--name", "mix", "--ranks", "3,2", "--iterations", "2", "--output", output]
    assert main(["loras", *loras, *words]) == REFUSED
    assert "--create" in capsys.readouterr().err
    assert main(["loras", *loras, *words, "--create"]) == SUCCESS
    shown = capsys.readouterr().out
    assert "mix: 2 LoRAs, 2 shared LoRAs" in shown
    assert "In place of a put this into the prompt:\n<lora:mix_0-3:" in shown
    assert "hyper-model" not in shown
    other = str(write_lora(tmp_path / "c.safetensors", 5))
    assert main(["fit", "mix", other, "--topup", "2", "--style", "--output", output]) == SUCCESS
    shown = capsys.readouterr().out
    assert "with the top-up mix_fit-c-2 (rank 2, " in shown
    assert "<lora:mix_fit-c-2:1.00000>" in shown
    assert "In place of c put this into the prompt:" in shown
    assert "mix: c" in shown


def test_a_name_is_suggested(tmp_path, loras, capsys):
    output = str(tmp_path / "models")
    words = ["--budget", "60kB", "--output", output, "--create", "--iterations", "1"]
    assert main(["loras", *loras, *words]) == SUCCESS
    assert "hyper-a-2: 2 LoRAs" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--rank", "2"], ["--size", "60kB"], ["--keep", "80%"]])
def test_a_lora_is_resized(tmp_path, loras, words, capsys):
    to = str(tmp_path / "small.safetensors")
    assert main(["resize", loras[0], *words, "--to", to]) == SUCCESS
    assert "kept: " in capsys.readouterr().out
    assert len(load_file(to)[f"{QUERY}.lora_down.weight"]) < 4
    assert main(["resize", loras[0], *words, "--to", to]) == REFUSED
    assert "exists" in capsys.readouterr().err
    assert main(["resize", loras[0], *words, "--to", to, "--overwrite"]) == SUCCESS


def test_loras_are_combined(tmp_path, loras, capsys):
    assert main(["combine", *loras, "--multipliers", "1", "-0.5"]) == SUCCESS
    assert "1 * a - 0.5 * b" in capsys.readouterr().out
    assert len(load_file(tmp_path / "a-and-b.safetensors")[f"{QUERY}.lora_down.weight"]) == 8


def test_a_checkpoint_takes_loras_and_gives_them_back(tmp_path, files, capsys):
    from tiny_family import layers_of

    layer = layers_of(files[0])[0]
    import torch

    state = {
        f"{layer.module}.lora_up.weight": torch.ones(layer.up_shape(1)),
        f"{layer.module}.lora_down.weight": torch.ones(layer.down_shape(1)),
    }
    lora = str(write(tmp_path / "one.safetensors", state))
    added, back = str(tmp_path / "added.safetensors"), str(tmp_path / "back.safetensors")
    assert main(["add", str(files[0]), lora, "--multipliers", "0.5", "--to", added]) == SUCCESS
    assert "a and 0.5 * one" in capsys.readouterr().out
    assert main(["subtract", added, lora, "--multipliers", "0.5", "--to", back]) == SUCCESS
    before, after = load_file(files[0]), load_file(back)
    torch.testing.assert_close(after[layer.key], before[layer.key], atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resize", "{a}", "--rank", "x"], "option --rank"),
        (["resize", "{a}", "--keep", "0%"], "option --keep"),
        (["combine", "{a}", "{b}", "--multipliers", "1"], "option --multipliers"),
        (["combine", "{a}", "{b}", "--multipliers", "1", "one"], "option --multipliers"),
        (["add", "{a}", "{b}"], "LoRA"),
        (["loras", "{a}", "--name", "mix"], "wer than two"),
        (["loras", "{a}", "{b}", "--ranks", "4", "--budget", "1MB"], "one of ranks"),
        (["resize", "missing.safetensors", "--rank", "2"], "does not exist"),
    ],
)
def test_bad_input_is_refused(loras, words, message, capsys):
    given = [word.format(a=loras[0], b=loras[1]) for word in words]
    assert main(given) == REFUSED
    assert message in capsys.readouterr().err


def test_a_size_is_needed(loras):
    with pytest.raises(SystemExit):
        main(["resize", loras[0]])


def test_dora_is_refused_with_the_reason(tmp_path, capsys):
    import torch

    state = {**kohya({}), f"{QUERY}.dora_scale": torch.ones(320)}
    path = str(write(tmp_path / "dora.safetensors", state))
    assert main(["resize", path, "--rank", "2"]) == REFUSED
    error = capsys.readouterr().err
    assert "dora.safetensors" in error
    assert "DoRA scales the weights of its base" in error


def test_a_single_lora_is_told_what_to_do(loras, capsys):
    assert main(["loras", loras[0], "--name", "mix"]) == REFUSED
    error = capsys.readouterr().err
    assert "Fewer than two LoRAs" in error
    assert "checkpoint" not in error


def test_a_plan_writes_nothing(tmp_path, loras, capsys):
    output = tmp_path / "models"
    words = ["--ranks", "3,2", "--output", str(output), "--plan"]
    assert main(["loras", *loras, *words]) == SUCCESS
    shown = capsys.readouterr().out
    assert "<- asked for" in shown
    assert "none of them" in shown
    assert "average" not in shown
    assert not output.exists()


def test_runs_of_loras_are_listed_and_deleted(tmp_path, loras, capsys):
    output = str(tmp_path / "models")
    words = ["--name", "mix", "--ranks", "3,2", "--iterations", "2", "--output", output]
    assert main(["loras", *loras, *words, "--create"]) == SUCCESS
    capsys.readouterr()
    assert main(["runs", "--output", output]) == SUCCESS
    assert "mix: 20" in capsys.readouterr().out
    assert main(["runs", "delete", "mix", "--yes", "--output", output]) == SUCCESS
    assert "mix_0-3.safetensors" in capsys.readouterr().out
    assert not list((tmp_path / "models/Lora").glob("*.safetensors"))
    assert main(["runs", "--output", output]) == SUCCESS
    assert "no runs in" in capsys.readouterr().out
