"""Output that is piped in an encoding without the letters of a file's name, as Windows does."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_family import snapshot

from hyper_merge.cli.output import escape_unknown_letters, say

ROOT = Path(__file__).parents[2]
FAST = ["--ranks", "2", "--iterations", "1", "--device", "cpu"]
CHINESE = "模型.safetensors"
ESCAPED = CHINESE.encode("ascii", "backslashreplace").decode()


def run_piped(*arguments, encoding="cp1252"):
    """Runs a command in a process of its own whose output is piped in an encoding."""
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "hyper_merge", *map(str, arguments)],
        env=environment,
        capture_output=True,
        check=False,
    )


def with_name(files, folder, name):
    """The checkpoints with the first under another name."""
    path = folder / name
    shutil.copy(files[0], path)
    return [path, *files[1:]]


@pytest.mark.slow
def test_a_merge_of_a_chinese_name_succeeds(files, tmp_path):
    models = with_name(files, tmp_path, CHINESE)
    output = tmp_path / "models"
    output.mkdir()
    words = ["--name", "mix", "--models", *models, "--output", output, *FAST]
    result = run_piped("merge", *words)
    assert (result.returncode, b"Traceback" in result.stderr) == (0, False)
    assert ESCAPED.removesuffix(".safetensors") in result.stdout.decode("cp1252")
    assert "Stable-diffusion/mix.safetensors" in snapshot(output)


@pytest.mark.slow
def test_inspect_prints_a_chinese_name(files, tmp_path):
    result = run_piped("inspect", *with_name(files, tmp_path, CHINESE))
    assert (result.returncode, result.stderr) == (0, b"")
    assert ESCAPED in result.stdout.decode("cp1252")


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8"])
def test_half_a_surrogate_pair_is_printed_as_a_code(encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    escape_unknown_letters()
    say("half\udc80\ud800 é")
    assert raw.getvalue().decode(encoding) == "half\\udc80\\ud800 é\n"


@pytest.mark.slow
def test_a_refusal_names_a_chinese_file(tmp_path):
    result = run_piped("inspect", tmp_path / CHINESE)
    assert result.returncode == 2
    assert f"{ESCAPED} does not exist" in result.stderr.decode("cp1252")
