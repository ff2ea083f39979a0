import hashlib

import pytest
import torch
from safetensors.torch import save_file

from hyper_merge.checkpoints.io.hashes import file_sha256, legacy_hash, tensor_data_sha256
from hyper_merge.errors import CheckpointError


def test_file_hash_is_that_of_all_bytes_across_chunks(tmp_path):
    content = bytes(range(256)) * 40_000  # more than two chunks
    (tmp_path / "x").write_bytes(content)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_hash_of_tensor_data_ignores_the_metadata(tmp_path):
    tensor = torch.arange(6.0)
    for name in ("a", "bb"):
        save_file({"x": tensor}, tmp_path / name, metadata={"name": name})
    data = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert tensor_data_sha256(tmp_path / "a") == tensor_data_sha256(tmp_path / "bb") == data


def test_legacy_hash_is_of_64_kib_at_1_mib(tmp_path):
    content = bytes(2**20) + b"\1" * 2**16 + b"\2"
    (tmp_path / "x").write_bytes(content)
    assert legacy_hash(tmp_path / "x") == hashlib.sha256(b"\1" * 2**16).hexdigest()[:8]


def test_hashing_reports_chunks_and_can_be_stopped(tmp_path):
    (tmp_path / "x").write_bytes(bytes(10_000_000))
    chunks = []
    file_sha256(tmp_path / "x", chunks.append)
    assert chunks == [2**22, 2**22, 10_000_000 - 2**23]

    def stop(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        file_sha256(tmp_path / "x", stop)


@pytest.mark.parametrize("function", [file_sha256, tensor_data_sha256, legacy_hash])
def test_hashing_a_missing_file_is_refused(tmp_path, function):
    with pytest.raises(CheckpointError, match="gone cannot be read"):
        function(tmp_path / "gone")
