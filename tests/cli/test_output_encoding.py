"""Output that is piped in an encoding without the letters of a file's name, as Windows does."""

import io
import shutil
import sys

import pytest
from tiny_family import snapshot

from hyper_merge.cli.main import main
from hyper_merge.cli.output import escape_unknown_letters, say

FAST = ["--ranks", "2", "--iterations", "1", "--device", "cpu"]
CHINESE = "模型.safetensors"
ESCAPED = CHINESE.encode("ascii", "backslashreplace").decode()


def with_name(files, folder, name):
    """The checkpoints with the first under another name."""
    path = folder / name
    shutil.copy(files[0], path)
    return [path, *files[1:]]


@pytest.fixture
def piped(monkeypatch):
    """Returns a function that pipes a stream of this process in Windows' encoding, and its bytes."""

    def pipe(stream):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(raw, "cp1252"))
        return raw

    return pipe


def test_a_merge_of_a_chinese_name_succeeds(files, tmp_path, piped):
    models = with_name(files, tmp_path, CHINESE)
    output = tmp_path / "models"
    output.mkdir()
    words = ["--name", "mix", "--models", *models, "--output", output, *FAST]
    out = piped("stdout")
    assert main(["merge", *map(str, words)]) == 0
    assert ESCAPED.removesuffix(".safetensors") in out.getvalue().decode("cp1252")
    assert "Stable-diffusion/mix.safetensors" in snapshot(output)


def test_inspect_prints_a_chinese_name(files, tmp_path, piped):
    out = piped("stdout")
    assert main(["inspect", *map(str, with_name(files, tmp_path, CHINESE))]) == 0
    assert ESCAPED in out.getvalue().decode("cp1252")


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8"])
def test_half_a_surrogate_pair_is_printed_as_a_code(encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    escape_unknown_letters()
    say("half\udc80\ud800 é")
    assert raw.getvalue().decode(encoding) == "half\\udc80\\ud800 é\n"


def test_a_refusal_names_a_chinese_file(tmp_path, piped):
    err = piped("stderr")
    assert main(["inspect", str(tmp_path / CHINESE)]) == 2
    assert f"{ESCAPED} does not exist" in err.getvalue().decode("cp1252")
