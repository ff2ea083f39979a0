import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hyper_merge.checkpoints.io.header import TensorInfo
from hyper_merge.checkpoints.io.mapped_tensors import MappedTensors
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.errors import CheckpointError

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="files with holes, list of mappings")


def mappings_of(path: Path) -> list[str]:
    """Returns the rights of this process's mappings of a file, as the system lists them."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split()[1] for line in lines if line.endswith(str(path))]


@on_linux
def test_a_file_larger_than_the_memory_is_read(tmp_path):
    path = tmp_path / "sparse.safetensors"
    infos = {key: TensorInfo(torch.float16, (2**17, 2**17)) for key in ("a", "b")}  # 64 GiB
    writer = SafetensorsWriter(path, infos, {})
    path.write_bytes(writer._header)
    with path.open("r+b") as stream:
        stream.truncate(writer.size)
        stream.seek(writer.size - 2)
        stream.write(b"\x00\x3c")  # 1 in float16
    with CheckpointReader(path) as checkpoint:
        assert checkpoint.tensor("a").shape == (2**17, 2**17)
        assert checkpoint.tensor("b")[-1, -2:].tolist() == [0, 1]


@on_linux
def test_the_mapping_is_read_only_and_shared_so_that_it_takes_no_memory(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(3)}, path)
    with CheckpointReader(path) as checkpoint:
        assert checkpoint.tensor("x").tolist() == [0, 1, 2]
        assert mappings_of(path) == ["r--s"]


@on_linux
def test_the_mapping_lives_as_long_as_the_last_tensor(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(3)}, path)
    with CheckpointReader(path) as checkpoint:
        tensor = checkpoint.tensor("x")
    assert mappings_of(path)
    assert tensor.tolist() == [0, 1, 2]
    row = tensor[1:]
    del tensor
    assert row.tolist() == [1, 2]
    del row
    assert not mappings_of(path), "what Windows would let nobody delete"


@on_linux
def test_a_refused_tensor_leaves_no_mapping(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(3)}, path)
    with CheckpointReader(path) as checkpoint, pytest.raises(CheckpointError):
        checkpoint.tensor("y")
    assert not mappings_of(path)


@pytest.mark.parametrize("padding", range(8))
def test_tensors_need_not_be_aligned(write_raw, padding):
    state = {
        "F64": torch.tensor([1.5, -2.0], dtype=torch.float64),
        "F16": torch.tensor([[3.0], [0.5]], dtype=torch.float16),
        "BF16": torch.tensor(-7.0, dtype=torch.bfloat16),
        "U8": torch.tensor([255], dtype=torch.uint8),
        "I64": torch.empty(0, 3, dtype=torch.int64),
        "F32": torch.tensor([0.1]),
    }
    table, data = {}, b""
    for key, tensor in state.items():
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(content)]
        table[key] = {"dtype": key, "shape": list(tensor.shape), "data_offsets": offsets}
        data += content
    table["__metadata__"] = {"pad": "x" * padding}
    with CheckpointReader(write_raw(table, data)) as checkpoint:
        for key, tensor in state.items():
            read = checkpoint.tensor(key)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)
            assert read.data_ptr() % read.dtype.itemsize == 0


def test_a_closed_file_gives_no_tensor(tmp_path):
    save_file({"x": torch.arange(3)}, tmp_path / "a.safetensors")
    with MappedTensors(tmp_path / "a.safetensors") as tensors:
        pass
    with pytest.raises(KeyError):
        tensors.get("x")
