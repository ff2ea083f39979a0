"""The commands for what follows a merge: what they print, and one message for what is refused."""

import pytest
import torch
from tiny_family import snapshot, write

from hyper_merge.cli import main as cli
from hyper_merge.runs.folders import Folders
from hyper_merge.runtime.formatting import format_size


@pytest.fixture
def run(capsys):
    """Runs a command; exit code, standard output, the message on standard error."""

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, [line.strip() for line in err.splitlines()]

    return run


@pytest.fixture
def root(started, merged):
    """A models folder with a merge, with a manifest as if it had been made there."""
    manifest, old = started / "hyper-merge/mix/manifest.json", merged.place.loras.parent
    manifest.write_text(manifest.read_text().replace(str(old), str(started)))
    return started


@pytest.fixture
def other(tmp_path, state_of):
    """A checkpoint that was not merged."""
    first, second = (state_of(c, torch.float32) for c in (0, 1))
    state = {
        key: (0.5 * (tensor + second[key])).half() if tensor.is_floating_point() else tensor
        for key, tensor in first.items()
    }
    return write(tmp_path / "later.safetensors", state)


def test_a_fit_is_printed_and_listed(root, other, run):
    code, out, err = run("fit", "mix", other, "--output", root, "--topup", "2", "--style")
    assert (code, err) == (0, [])
    text = (root / "hyper-merge/mix/fits/later.txt").read_text()
    assert out.startswith(text)
    tags = text.splitlines()[-1]
    assert "<lora:mix_fit-later-2:1.00000>" in tags
    assert out.splitlines()[-1] == f"mix: later,{tags},"
    code, out, err = run("runs", "--output", root)
    assert (code, err) == (0, [])
    assert "; fitted: later " in out
    record = root / "hyper-merge/mix/fits/later.json"
    record.write_text("{")
    code, _, err = run("runs", "--output", root)
    assert code == 0
    assert err[0].startswith("note: the fit later of the run mix cannot be read")


def test_a_checkpoint_is_restored_alone_or_in_a_mixture(root, run):
    code, out, err = run("restore", "mix", "a", "--output", root, "--dtype", "float32")
    assert (code, err) == (0, [])
    path = root / "Stable-diffusion/a-restored.safetensors"
    assert path.exists()
    assert out.startswith("a-restored: 1 a, of the run mix\nmeasured against the original")
    assert f"checkpoint: {path} (" in out
    mixed = root / "mixed.safetensors"
    code, out, err = run("restore", "mix", "--mix", "a:0.5,b:0.25", "--to", mixed, "--output", root)
    assert (code, err) == (0, [])
    assert out.startswith("mixed: 0.5 a + 0.25 b, of the run mix\nnote: the shares add up to 0.75")
    assert mixed.exists()


def test_what_is_safe_is_told_and_nothing_deleted(root, run, files):
    before = snapshot(root)
    code, out, err = run("safe", "mix", "--output", root, "--threshold", "1%")
    assert (code, err) == (0, [])
    assert out.startswith("mix: safe to delete is what is restored to 1%\n")
    assert f"would free {format_size(sum(path.stat().st_size for path in files))}\n" in out
    assert out.endswith("nothing was deleted; that is up to you\n")
    assert snapshot(root) == before
    assert all(path.exists() for path in files)


def test_a_run_absorbs_a_checkpoint(root, other, run):
    code, out, err = run("absorb", "mix", other, "--output", root, "--name", "four")
    assert (code, err) == (0, [])
    assert "\nfour: 4 checkpoints, 2 shared LoRAs\n" in "\n" + out
    assert (Folders.under(root).runs / "four/manifest.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "mix", "x.safetensors", "--topup", "lots"], "option --topup: expected a rank"),
        (["fit", "mix", "x.safetensors", "--seed", "x"], "option --seed: expected a whole number"),
        (["fit", "mix", "x.safetensors"], "x.safetensors does not exist"),
        (["restore", "mix"], "expected the name of a checkpoint, or else --mix"),
        (["restore", "mix", "a", "--mix", "a:1"], "expected the name of a checkpoint, or else"),
        (["restore", "mix", "--mix", "a"], "expected checkpoints with their shares"),
        (["restore", "mix", "a", "--dtype", "half"], "option --dtype: expected one of float16"),
        (["restore", "mix", "aa"], 'the run mix has no checkpoint aa; did you mean "a"? It has'),
        (["safe", "mix", "--threshold", "many"], "option --threshold: expected a share"),
        (["safe", "mxi"], "there is no run mxi"),
        (["absorb", "mix", "x.safetensors", "--name", "a/b"], "option --name: the path separator"),
    ],
)
def test_what_is_refused_is_one_message_with_nothing_written(root, run, words, message):
    before = snapshot(root)
    code, out, err = run(*words, "--output", root)
    assert (code, out) == (2, "")
    assert err[0].startswith(f"hyper-merge: {message}")
    assert len(err) == 1
    assert snapshot(root) == before
