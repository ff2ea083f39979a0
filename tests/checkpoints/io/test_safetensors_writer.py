import errno
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from hyper_merge.checkpoints.io.dtypes import TORCH_DTYPES
from hyper_merge.checkpoints.io.hashes import tensor_data_sha256
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter, content_sha256
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.checkpoints.reader import TensorInfo, read_header
from hyper_merge.errors import OutputError


def declare(tensors):
    return {key: TensorInfo(t.dtype, tuple(t.shape)) for key, t in tensors.items()}


def write(path, tensors, metadata=None, **options):
    with SafetensorsWriter(path, declare(tensors), metadata or {}, **options) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)


def header_order(content):
    length = int.from_bytes(content[:8], "little")
    return list(json.loads(content[8 : 8 + length]))


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_bytes_of_a_small_file_are_exact(tmp_path):
    write(tmp_path / "x", {"a": torch.tensor([1, -2], dtype=torch.int16)}, {"é": '"'})
    text = (
        '{"__metadata__":{"format":"pt","é":"\\""},'
        '"a":{"dtype":"I16","shape":[2],"data_offsets":[0,4]}}'
    ).encode()
    text += b" " * (-len(text) % 8)
    expected = len(text).to_bytes(8, "little") + text + b"\x01\x00\xfe\xff"
    assert (tmp_path / "x").read_bytes() == expected


def test_bytes_are_those_of_the_library(tmp_path):
    tensors = {"b": torch.randn(2, 3), "a": torch.randn(5), "c": torch.randn(2).double()}
    write(tmp_path / "x", tensors)
    assert (tmp_path / "x").read_bytes() == save(tensors, {"format": "pt"})


def test_the_library_reads_every_written_type(tmp_path):
    tensors = {
        f"{i % 3}.{name}": torch.tensor([[0, 1, 1]]).to(dtype)
        for i, (name, dtype) in enumerate(TORCH_DTYPES.items())
    }
    write(tmp_path / "x", tensors)
    read = load_file(tmp_path / "x")
    assert read.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype
        assert read[key].shape == tensor.shape
        assert bits(read[key]) == bits(tensor)
    written, library = (tmp_path / "x").read_bytes(), save(tensors, {"format": "pt"})
    assert header_order(written) == header_order(library)


def test_scalars_empty_and_transposed_tensors_come_back(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "none": torch.zeros(0, dtype=torch.int64),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "expanded": torch.arange(3).expand(2, 3),
    }
    write(tmp_path / "x", tensors)
    for key, tensor in load_file(tmp_path / "x").items():
        torch.testing.assert_close(tensor, tensors[key].contiguous(), rtol=0, atol=0)


def test_a_file_without_tensors_is_written(tmp_path):
    write(tmp_path / "x.safetensors", {}, {"note": "n"})
    assert read_header(tmp_path / "x.safetensors").metadata == {"format": "pt", "note": "n"}


def test_tensors_are_cast_to_the_declared_type(tmp_path):
    with SafetensorsWriter(tmp_path / "x", {"a": TensorInfo(torch.bfloat16, (2,))}, {}) as writer:
        writer.write("a", torch.tensor([1.0, 3.14159], requires_grad=True))
    assert load_file(tmp_path / "x")["a"].tolist() == [1.0, 3.140625]


@settings(max_examples=60, deadline=None)
@given(
    declared=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
            lambda key: key != "__metadata__"
        ),
        st.builds(
            TensorInfo,
            st.sampled_from(list(TORCH_DTYPES.values())),
            st.lists(st.integers(0, 4), max_size=4).map(tuple),
        ),
        max_size=6,
    ),
    metadata=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), st.text("aé{"), max_size=2
    ),
    seed=st.integers(0, 100),
)
def test_any_tensors_in_any_order_come_back(tmp_path_factory, declared, metadata, seed):
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    tensors = {
        key: torch.randint(0, 2, info.shape).to(info.dtype) for key, info in declared.items()
    }
    keys = list(tensors)
    random.Random(seed).shuffle(keys)
    with SafetensorsWriter(path, declared, metadata) as writer:
        for key in keys:
            writer.write(key, tensors[key])
    assert writer.size == path.stat().st_size
    header = read_header(path)
    assert header.tensors == declared
    assert header.metadata == {**metadata, "format": "pt"}
    for key, tensor in load_file(path).items():
        assert bits(tensor) == bits(tensors[key])


def test_the_hash_of_the_tensors_is_known_beforehand(tmp_path):
    tensors = {"b": torch.randn(2, 3), "a": torch.randn(4)}
    declared = {"b": TensorInfo(torch.float16, (2, 3)), "a": TensorInfo(torch.float32, (4,))}
    with SafetensorsWriter(tmp_path / "x", declared, {}) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)
    assert content_sha256(tensors, declared) == tensor_data_sha256(tmp_path / "x")


def misuse(path):
    declared = {"a": TensorInfo(torch.float32, (2,)), "b": TensorInfo(torch.float32, (2,))}
    with SafetensorsWriter(path, declared, {}) as writer:
        with pytest.raises(ValueError, match="'c' was not declared for x"):
            writer.write("c", torch.zeros(2))
        with pytest.raises(ValueError, match=r"declared \(2,\), got \(1, 2\)"):
            writer.write("a", torch.zeros(1, 2))
        writer.write("a", torch.zeros(2))
        with pytest.raises(ValueError, match="'a' is written already"):
            writer.write("a", torch.zeros(2))


def test_the_writer_refuses_what_was_not_declared(tmp_path):
    with pytest.raises(ValueError, match=r"x lacks 1 of 2 declared tensors \(first: b\)"):
        misuse(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "text"),
    [
        ({}, {"n": 3}, TypeError, "'n' is int"),
        ({}, {3: "n"}, TypeError, "3 is str"),
        ({"__metadata__": TensorInfo(torch.float32, ())}, {}, ValueError, "no tensor can be named"),
        (
            {"x": TensorInfo(torch.complex128, ())},
            {},
            ValueError,
            "'x': no .safetensors file holds",
        ),
        ({}, {"n": "\ud800"}, ValueError, "surrogates not allowed"),
    ],
)
def test_headers_that_cannot_be_written_are_refused(tmp_path, tensors, metadata, error, text):
    with pytest.raises(error, match=text):
        SafetensorsWriter(tmp_path / "x", tensors, metadata)


def write_half(path, then):
    declared = {key: TensorInfo(torch.float32, (9,)) for key in "ab"}
    with SafetensorsWriter(path, declared, {}, overwrite=path.exists()) as writer:
        writer.write("a", torch.ones(9))
        then()
        writer.write("b", torch.ones(9))


def fail_with(error):
    def function(*args, **kwargs):
        raise error

    return function


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "x"
    write(path, {"a": torch.zeros(3)})
    before = path.read_bytes()
    with pytest.raises(error):
        write_half(path, then=fail_with(error()))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_file_is_replaced_whole(tmp_path):
    path = tmp_path / "x"
    write(path, {"a": torch.zeros(3)})
    write(path, {"b": torch.ones(4)})
    assert list(load_file(path)) == ["b"]
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_file_is_refused_first_and_last(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(OutputError, match="x exists; choose another name, or --overwrite"):
        write_half(path, then=lambda: path.write_text("somebody else's"))
    assert path.read_text() == "somebody else's"
    with pytest.raises(OutputError, match="x exists"):
        write(path, {"a": torch.zeros(3)}, overwrite=False)
    assert path.read_text() == "somebody else's"
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys, torch
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.checkpoints.reader import TensorInfo
declared = {key: TensorInfo(torch.float32, (1000,)) for key in "ab"}
with FileTransaction(overwrite=True) as outputs:
    outputs.text(sys.argv[2], "new")
    with outputs.safetensors(sys.argv[1], declared, {}) as writer:
        writer.write("a", torch.ones(1000))
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_midway_leaves_the_old_files(tmp_path):
    path, text = tmp_path / "x.safetensors", tmp_path / "x.txt"
    write(path, {"a": torch.zeros(3)})
    text.write_text("old")
    before = hashlib.sha256(path.read_bytes()).digest()
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), str(text)],
        check=False,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=240,
    )
    assert done.returncode == -9
    assert hashlib.sha256(path.read_bytes()).digest() == before
    assert text.read_text() == "old"
    left = {file.name for file in tmp_path.iterdir()} - {path.name, text.name}
    assert all(name.startswith(".hyper-merge-") for name in left)
    assert sorted(Path(name).suffix for name in left) == [".lock", ".tmp", ".tmp"]
    with FileTransaction(overwrite=True) as outputs:
        outputs.text(text, "new")
    assert {*tmp_path.iterdir()} == {path, text}


def refuse(code):
    return fail_with(OSError(code, os.strerror(code)))


@pytest.mark.parametrize(
    ("function", "code", "text"),
    [
        ("posix_fallocate", errno.ENOSPC, "needed, .* free.: the disk is full; free some space"),
        ("posix_fallocate", errno.EFBIG, "the file system cannot hold so large a file"),
        ("pwrite", errno.ENOSPC, "the disk is full"),
        ("pwrite", errno.EIO, "Input/output error"),
        ("fsync", errno.EDQUOT, "the disk quota is used up"),
    ],
)
def test_a_failing_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch, function, code, text):
    monkeypatch.setattr(os, function, refuse(code))
    with pytest.raises(OutputError, match=rf"cannot write .*x \(\d+ bytes {text}|{text}"):
        write(tmp_path / "x", {"a": torch.zeros(3)})
    assert list(tmp_path.iterdir()) == []


def test_files_are_written_where_space_cannot_be_reserved(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.EOPNOTSUPP))
    write(tmp_path / "x", {"a": torch.zeros(3)})
    assert list(load_file(tmp_path / "x")) == ["a"]


def test_too_little_unreserved_space_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.EINVAL))
    declared = {"a": TensorInfo(torch.float32, (2**50,))}
    with (
        pytest.raises(OutputError, match="the disk is full"),
        SafetensorsWriter(tmp_path / "x", declared, {}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_short_writes_of_the_operating_system_are_continued(tmp_path, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: whole(file, data[:7], at))
    tensor = torch.randn(50)
    write(tmp_path / "x", {"a": tensor})
    assert torch.equal(load_file(tmp_path / "x")["a"], tensor)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("folder", "folder is a folder; choose another name"),
        ("none/x", "its folder does not exist"),
        ("x" * 300, "the name is too long"),
        ("nul\0", "cannot write .*nul"),
    ],
)
def test_places_that_cannot_be_written_are_refused(tmp_path, name, text):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=text):
        write(tmp_path / name, {"a": torch.zeros(3)})
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_a_read_only_folder_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "open", refuse(errno.EACCES))  # tests may run as root
    with pytest.raises(OutputError, match=r"x \(\d+ bytes .*permission denied"):
        write(tmp_path / "x", {"a": torch.zeros(3)})
