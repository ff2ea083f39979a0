"""The commands that follow a merge: what they take, say and refuse."""

import pytest
from tiny_family import snapshot

from hyper_merge import cli


@pytest.fixture
def run(capsys):
    """Runs a command; exit code, standard output, the message on standard error."""

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, [line.strip() for line in err.splitlines()]

    return run


def test_extract_writes_one_lora_and_says_how_good_it_is(files, tmp_path, run):
    options = ["--rank", "4", "--output", tmp_path, "--device", "cpu"]
    code, out, err = run("extract", files[0], files[1], *options)
    assert (code, err) == (0, [])
    lines = out.splitlines()
    assert lines[0].startswith("b-from-a: from a to b, rank 4 in ")
    assert lines[1].startswith("explained: ")
    assert f"LoRA: {tmp_path / 'Lora/b-from-a.safetensors'}" in lines
    assert lines[-1] == "<lora:b-from-a:1.00000>"
    code, out, err = run("extract", files[0], files[1], *options)
    assert (code, out, len(err)) == (2, "", 1)
    assert "b-from-a.safetensors exists; choose another name or allow overwriting" in err[0]
    code, out, err = run(
        "extract", files[0], files[1], *options, "--overwrite", "--dtype", "float32"
    )
    assert (code, err) == (0, [])
    named = [*options[:2], "--output", tmp_path / "x.safetensors", "--seed", "7"]
    code, out, _ = run("extract", files[0], files[1], *named)
    assert code == 0
    assert out.endswith("<lora:x:1.00000>\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--rank", "0"),
            "option --rank: expected a whole number from 1 to 4096, got the number 0",
        ),
        (("--rank", "many"), 'option --rank: expected a whole number from 1 to 4096, got "many"'),
        (("--dtype", "fp8"), "option --dtype: expected one of float16, bfloat16, float32, got"),
        (("--name", "1:2"), 'option --name: the character ":" is not allowed'),
        (("--seed", "-1"), "option --seed: expected a whole number from 0 to"),
    ],
)
def test_extract_refuses_an_impossible_option_by_its_name(files, tmp_path, run, options, message):
    code, out, err = run("extract", *files[:2], "--output", tmp_path, *options)
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith(f"hyper-merge: {message}")
    assert snapshot(tmp_path) == {}


def test_extract_refuses_files_that_are_none(files, tmp_path, run):
    code, out, err = run("extract", files[0], "nowhere.safetensors", "--output", tmp_path)
    assert (code, out) == (2, "")
    assert err == ["hyper-merge: nowhere.safetensors does not exist; check the path"]


def test_a_name_that_looks_like_a_number_is_a_name(files, tmp_path, run):
    code, out, _ = run("extract", *files[:2], "--output", tmp_path, "--name", "007", "--rank", "1")
    assert code == 0
    assert out.endswith("<lora:007:1.00000>\n")


def test_export_writes_one_lora_per_checkpoint(started, run):
    code, out, err = run("export", "mix", "a", "c", "--output", started)
    assert (code, err) == (0, [])
    assert [line.split()[:2] for line in out.splitlines()[1:3]] == [["mix_a", "6"], ["mix_c", "6"]]
    assert out.endswith("To get a, load mix and put this into the prompt:\n<lora:mix_a:1.00000>\n")
    code, out, err = run(
        "export", "mix", "--all", "--rank", "2", "--overwrite", "--output", started
    )
    assert (code, err) == (0, [])
    assert [line.split()[1] for line in out.splitlines()[1:4]] == ["2", "2", "2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("mix",), "expected the names of checkpoints, or else --all;"),
        (("mix", "a", "--all"), "expected the names of checkpoints, or else --all;"),
        (
            ("mix", "a", "--rank", "0"),
            "option --rank: expected a whole number from 1 to 4096, got the",
        ),
        (("mix", "d"), "the run mix has no checkpoint d. It has a, b, c"),
        (("mixed", "a"), "there is no run mixed in"),
    ],
)
def test_export_refuses_what_it_cannot_do(started, run, options, message):
    before = snapshot(started)
    code, out, err = run("export", *options, "--output", started)
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith(f"hyper-merge: {message}")
    assert snapshot(started) == before
