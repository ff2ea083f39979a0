"""GGUF files as programs for pictures read them: quantised in blocks, of a network alone."""

import struct
import sys
import types

import gguf
import numpy as np
import pytest
import torch
from gguf_files import write_gguf

from hyper_merge.checkpoints.io import gguf_file
from hyper_merge.checkpoints.io.gguf_file import GgufTensors, rounding_error
from hyper_merge.checkpoints.reader import CheckpointReader, read_header
from hyper_merge.errors import CheckpointError

KINDS = gguf.GGMLQuantizationType


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_every_tensor_comes_as_it_was_written(tmp_path):
    plain = {"half.weight": ("F16", numbers(8, 12)), "bias": ("F32", numbers(8))}
    blocks = {f"{kind}.weight": (kind, numbers(6, 64)) for kind in ("Q8_0", "Q5_0", "Q4_1")}
    path = write_gguf(tmp_path / "a.gguf", {**plain, **blocks})
    header = read_header(path)
    assert header.rounded_as == ("Q4_1", "Q5_0", "Q8_0")
    with CheckpointReader(path) as file:
        assert torch.equal(file.tensor("bias"), torch.from_numpy(plain["bias"][1]))
        half = torch.from_numpy(plain["half.weight"][1]).half()
        assert torch.equal(file.tensor("half.weight"), half)
        for key, (kind, values) in blocks.items():
            packed = gguf.quants.quantize(values, KINDS[kind])
            expected = torch.from_numpy(gguf.quants.dequantize(packed, KINDS[kind]))
            assert torch.equal(file.tensor(key), expected)
            assert header.tensors[key].shape == (6, 64)


def test_a_block_of_q4_k_is_read_as_ggml_does(tmp_path):
    block = np.random.default_rng(1).integers(0, 256, 144, dtype=np.uint8).tobytes()
    block = struct.pack("<ee", 0.01, 0.03) + block[4:]
    path = write_gguf(tmp_path / "k.gguf", {"w": ("Q4_K", block, (1, 256))})
    with GgufTensors(path) as file:
        found = file.get("w")
    np.testing.assert_allclose(found.numpy(), [q4_k(block)], rtol=1e-5)


def q4_k(block):
    """Returns the 256 numbers of a block, by the loops of ggml's dequantize_row_q4_K."""
    d, least = struct.unpack("<ee", block[:4])
    scales, quants = block[4:16], block[16:]
    values = []
    for j in range(8):
        if j < 4:
            scale, offset = scales[j] & 63, scales[j + 4] & 63
        else:
            scale = (scales[j + 4] & 15) | ((scales[j - 4] >> 6) << 4)
            offset = (scales[j + 4] >> 4) | ((scales[j] >> 6) << 4)
        part = quants[j // 2 * 32 : j // 2 * 32 + 32]
        nibbles = [byte >> 4 if j % 2 else byte & 15 for byte in part]
        values += [d * scale * nibble - least * offset for nibble in nibbles]
    return values


def test_rows_that_were_cut_to_suit_the_blocks_have_their_shape_again(tmp_path):
    values = numbers(3, 256)
    shapes = {"conv.weight": (8, 32, 3, 1)}
    path = write_gguf(tmp_path / "a.gguf", {"conv.weight": ("F16", values)}, shapes)
    assert read_header(path).tensors["conv.weight"].shape == (8, 32, 3, 1)
    with CheckpointReader(path) as file:
        found = file.tensor("conv.weight")
    assert torch.equal(found.flatten(), torch.from_numpy(values).half().flatten())


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"])
def test_what_rounding_lost_is_known_without_the_original(tmp_path, kind):
    values = numbers(64, 512)
    path = write_gguf(tmp_path / "a.gguf", {"w": (kind, values)})
    with GgufTensors(path) as file:
        lost = np.linalg.norm(file.get("w").numpy() - values) / np.linalg.norm(values)
    assert rounding_error(path) == pytest.approx(lost, rel=0.15)


def test_a_coarser_kind_is_refused_by_name(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {"w": ("Q2_K", bytes(84), (1, 256))})
    with pytest.raises(CheckpointError, match=r"w in a.gguf is quantised as Q2_K.*; use a version"):
        read_header(path)


def test_without_the_package_the_file_says_how_to_have_it(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "a.gguf", {"w": ("F16", numbers(2, 2))})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"needs the package gguf.*; run: .*\[gguf\]"):
        read_header(path)


def test_a_number_of_entries_beyond_the_file_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "_MOST_READS", 2000)  # two millions take half a minute
    key = b"general.tags"
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 0, 2**60)
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry + bytes(64))
    with pytest.raises(CheckpointError, match=r"a.gguf is no GGUF file, or a damaged one: it ends"):
        read_header(path)
    with path.open("r+b") as file:
        file.truncate(2**33)
    with pytest.raises(CheckpointError, match="describes more than an image model has"):
        read_header(path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", {"w": ("Q8_0", numbers(4, 64))}).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in range(1, len(whole) - 32, 7):  # the rest may be padding
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut.gguf is no GGUF file, or a damaged one"):
            read_header(path)


def test_forge_neos_own_copy_serves_where_the_package_is_missing(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "a.gguf", {"w": ("Q8_0", numbers(2, 32))})
    copy = "modules_forge.packages.gguf"
    for name in ("modules_forge", "modules_forge.packages"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, copy, gguf)
    monkeypatch.setitem(sys.modules, f"{copy}.quants", gguf.quants)
    for name in ("gguf", "gguf.quants"):
        monkeypatch.setitem(sys.modules, name, None)
    assert read_header(path).rounded_as == ("Q8_0",)
