import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from hyper_merge.checkpoints.fingerprint import fingerprint
from hyper_merge.checkpoints.io.dtypes import EIGHT_BIT_FLOATS, TORCH_DTYPES
from hyper_merge.checkpoints.reader import CheckpointReader, TensorInfo, read_header
from hyper_merge.errors import CheckpointError


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def save_small(path: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "b.weight": torch.randn(3, 5, generator=generator).half(),
        "a.bias": torch.randn(5, generator=generator),
        "ids": torch.arange(4),
        "marker": torch.zeros(0),
        "scalar": torch.tensor(2.5),
    }
    save_file(tensors, path, metadata={"note": "é"})
    return tensors


def test_header_tells_types_shapes_metadata_and_size(tmp_path):
    path = tmp_path / "small.safetensors"
    tensors = save_small(path)
    header = read_header(path)
    assert header.tensors == {k: TensorInfo(t.dtype, tuple(t.shape)) for k, t in tensors.items()}
    assert header.metadata == {"note": "é"}
    assert (header.size, header.name, header.stem) == (path.stat().st_size, path.name, "small")
    assert header.tensors["b.weight"].nbytes == 30
    assert header.tensors["scalar"].numel == 1
    assert header.tensors["marker"].nbytes == 0


def test_tensors_are_those_that_the_library_wrote(tmp_path):
    tensors = save_small(tmp_path / "small.safetensors")
    with CheckpointReader(tmp_path / "small.safetensors") as checkpoint:
        for key, tensor in tensors.items():
            torch.testing.assert_close(checkpoint.tensor(key), tensor, rtol=0, atol=0)


def test_every_type_is_read_8_bit_floats_as_float16(tmp_path):
    tensors = {name: torch.tensor([0, 1]).to(dtype) for name, dtype in TORCH_DTYPES.items()}
    path = tmp_path / "types.safetensors"
    save_file(tensors, path)
    with CheckpointReader(path) as checkpoint:
        for name, dtype in TORCH_DTYPES.items():
            read = checkpoint.tensor(name)
            expected = tensors[name].half() if dtype in EIGHT_BIT_FLOATS else tensors[name]
            assert read.dtype == expected.dtype
            assert read.view(torch.uint8).tolist() == expected.view(torch.uint8).tolist()


def test_the_same_tensor_twice_is_one_piece_of_memory(tmp_path):
    save_small(tmp_path / "small.safetensors")
    with CheckpointReader(tmp_path / "small.safetensors") as checkpoint:
        first, second = checkpoint.tensor("b.weight"), checkpoint.tensor("b.weight")
        assert first.data_ptr() == second.data_ptr()


def test_the_suffix_may_be_of_any_case(tmp_path):
    path = tmp_path / "SMALL.SafeTensors"
    save_small(path)
    assert "ids" in read_header(path).tensors


def test_types_unknown_to_torch_are_named(write_raw):
    table = {"x": entry("F4", (4,), (0, 2)), "y": entry("F32", (1,), (2, 6))}
    path = write_raw(table, bytes(6))
    header = read_header(path)
    assert header.unsupported == {"x": "F4"}
    assert list(header.tensors) == ["y"]
    with CheckpointReader(path, header) as checkpoint:
        assert checkpoint.tensor("y").tolist() == [0]
        with pytest.raises(CheckpointError, match=r"x in x.safetensors is stored as F4, unknown"):
            checkpoint.tensor("x")


def test_the_table_may_list_tensors_in_any_order(write_raw):
    table = {"y": entry(offsets=(8, 16)), "x": entry(offsets=(0, 8))}
    assert list(read_header(write_raw(table, bytes(16))).tensors) == ["x", "y"]


def test_metadata_of_null_are_none(write_raw):
    path = write_raw({"__metadata__": None, "x": entry(offsets=(0, 8))}, bytes(8))
    assert read_header(path).metadata == {}
    with CheckpointReader(path) as checkpoint:
        assert checkpoint.tensor("x").tolist() == [0, 0]


def test_an_unknown_key_is_refused_by_name(tmp_path):
    save_small(tmp_path / "small.safetensors")
    with (
        CheckpointReader(tmp_path / "small.safetensors") as checkpoint,
        pytest.raises(CheckpointError, match=r"small.safetensors has no tensor 'nope'"),
    ):
        checkpoint.tensor("nope")


def test_a_closed_checkpoint_reads_no_more(tmp_path):
    save_small(tmp_path / "small.safetensors")
    with CheckpointReader(tmp_path / "small.safetensors") as checkpoint:
        pass
    with pytest.raises(CheckpointError, match=r"small.safetensors is closed"):
        checkpoint.tensor("ids")
    with pytest.raises(CheckpointError, match="is not open"):
        _ = CheckpointReader(tmp_path / "small.safetensors").header


def test_a_file_that_changes_while_being_read_is_refused(tmp_path):
    path = tmp_path / "small.safetensors"
    save_small(path)
    with CheckpointReader(path) as checkpoint:
        checkpoint.tensor("ids")
        os.utime(path, ns=(1, 1))
        with pytest.raises(
            CheckpointError, match=r"small.safetensors was changed while being read"
        ):
            checkpoint.tensor("ids")


def test_a_file_changed_after_its_header_is_refused(tmp_path):
    path = tmp_path / "small.safetensors"
    save_small(path)
    header = read_header(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="was changed"), CheckpointReader(path, header):
        pass
    with pytest.raises(CheckpointError, match="was changed"):
        fingerprint(header)


@pytest.mark.parametrize(
    ("table", "data", "text"),
    [
        (b"[1]", b"", "does not begin with '{'"),
        (b"{nonsense}", b"", "its header is not JSON"),
        (b'{"x": "\xff"}', b"", "its header is not JSON"),
        (b'{"\\ud800": {}}', b"", "its header is not JSON"),
        (b'{"a":{},"a":{}}', b"", "a key stands twice"),
        (b'{"a":' + b"[" * 100_000, b"", "its header is not JSON"),
        ({"x": 3}, b"", "lacks dtype, shape or data_offsets"),
        ({"x": {"dtype": "F32", "shape": [2]}}, b"", "lacks dtype, shape or data_offsets"),
        ({"x": entry(shape=(-2,))}, bytes(8), "malformed"),
        ({"x": entry(shape=(True, 2))}, bytes(8), "malformed"),
        ({"x": entry(shape=(2.0,))}, bytes(8), "malformed"),
        ({"x": entry(shape=(0, 2**70), offsets=(0, 0))}, b"", "malformed"),
        ({"x": entry(offsets=(8, 0))}, bytes(8), "not a range"),
        ({"x": entry(offsets=(0, 8, 9))}, bytes(8), "not a range"),
        ({"x": entry(shape=(3,))}, bytes(8), r"shape \[3\] needs 12 bytes, its offsets span 8"),
        ({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12), "'y' overlaps the one before"),
        ({"x": entry(), "y": entry(offsets=(12, 20))}, bytes(20), "'y' leaves a gap"),
        ({"x": entry()}, bytes(11), "3 bytes beyond the last tensor"),
        ({"x": entry(), "__metadata__": {"n": 1}}, bytes(8), "something else than text"),
        ({"x": entry(), "__metadata__": "n"}, bytes(8), "something else than text"),
    ],
)
def test_damaged_headers_are_refused_by_reason(write_raw, table, data, text):
    path = write_raw(table, data)
    with pytest.raises(CheckpointError, match=rf"x\.safetensors is damaged.*{text}"):
        read_header(path)


def test_a_truncated_file_is_refused_with_both_sizes(tmp_path):
    path = tmp_path / "half.safetensors"
    save_file({"x": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    expected = (
        rf"truncated: by its header it has {len(whole):,} bytes, there are {len(whole) - 1000:,}"
    )
    with pytest.raises(
        CheckpointError,
        match=expected + "; wait if it is still being written, else download or copy it again",
    ):
        read_header(path)
    path.write_bytes(whole[:20])
    with pytest.raises(CheckpointError, match=r"half.safetensors is truncated.*there are 20;"):
        read_header(path)
    path.write_bytes(whole[:5])
    with pytest.raises(CheckpointError, match="only 5 bytes"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"PK\x03\x04" + bytes(100), "not a .safetensors file but a zip archive.*rename"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"GGUF\x03\x00\x00\x00" + bytes(100), "a GGUF file; rename it to .gguf"),
        (b"\xff" * 100, "more than 100,000,000"),
    ],
)
def test_other_files_under_this_suffix_are_named(tmp_path, content, text):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.safetensors is .*{text}"):
        read_header(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("missing.safetensors", "missing.safetensors does not exist"),
        ("folder.safetensors", "folder.safetensors is a folder, not a checkpoint"),
        ("empty.safetensors", "empty.safetensors is empty; download or copy it again"),
        (
            "a.txt",
            r"a.txt has the suffix '.txt', which is not read; choose a .safetensors, .ckpt or .gguf",
        ),
        ("bare", "bare has the suffix ''"),
        ("q.GGUF", "q.GGUF is no GGUF file, or a damaged one: GGUF magic invalid; download or"),
        ("a.txt/x.safetensors", "x.safetensors does not exist"),
        ("nul\0.safetensors", "is not a path"),
        ("pipe.safetensors", "device or pipe"),
    ],
)
def test_what_is_no_checkpoint_file_is_refused(tmp_path, name, text):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "empty.safetensors").touch()
    os.mkfifo(tmp_path / "pipe.safetensors")
    for other in ("a.txt", "bare", "q.GGUF"):
        (tmp_path / other).write_text("text")
    with pytest.raises(CheckpointError, match=text):
        read_header(tmp_path / name)


def test_a_file_without_the_right_to_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "small.safetensors"
    save_small(path)

    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)  # tests may run as root, who may read everything
    with pytest.raises(CheckpointError, match=r"small.safetensors may not be read: permission"):
        read_header(path)


def test_fingerprint_is_of_the_content_not_the_name(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_small(tmp_path / f"{name}.safetensors", seed)
    a, b, c = (fingerprint(read_header(tmp_path / f"{name}.safetensors")) for name in "abc")
    assert a == b != c
    assert len(a) == 64


def test_the_fingerprint_sees_changes_in_its_samples(tmp_path):
    path = tmp_path / "long.safetensors"
    save_file({"x": torch.zeros(6 * 2**20, dtype=torch.uint8)}, path)
    before = fingerprint(read_header(path))
    place = path.stat().st_size * 15 // 16
    with path.open("r+b") as stream:
        stream.seek(place)
        stream.write(b"\1")
    assert fingerprint(read_header(path)) != before


WHOLE = save({"a": torch.ones(2, 3), "b": torch.ones(4).half(), "c": torch.zeros(0)}, {"k": "v"})


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=3
    ),
    cut=st.integers(0, 20),
)
def test_a_damaged_file_is_refused_as_by_the_library(tmp_path, changes, cut):
    content = bytearray(WHOLE)
    for place, value in changes:
        content[place] = value
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(content[: len(content) - cut])
    try:
        header = read_header(path)
    except CheckpointError:
        return
    if not header.unsupported:
        with safe_open(path, framework="pt") as library:
            assert set(library.keys()) == set(header.tensors)
