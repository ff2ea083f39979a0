import io
import os
import pickle
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from hyper_merge.checkpoints.io.restricted_unpickler import RestrictedUnpickler
from hyper_merge.checkpoints.reader import CheckpointReader, TensorInfo, read_header
from hyper_merge.errors import CheckpointError


class Malicious:
    """Runs a shell command when an ordinary unpickler meets it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Callback:
    """Harmless, but no tensor: like the training callbacks in checkpoints of 2022."""


def weights():
    return {"a.weight": torch.randn(3, 4).half(), "b.bias": torch.nn.Parameter(torch.randn(4))}


@pytest.mark.parametrize("suffix", [".ckpt", ".CKPT", ".pt", ".pth"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_pickled_tensors_are_read_nested_or_flat(tmp_path, suffix, zipped, nested):
    path, tensors = tmp_path / f"x{suffix}", weights()
    content = {"state_dict": tensors, "epoch": 3} if nested else {**tensors, "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with CheckpointReader(path) as checkpoint:
        assert checkpoint.header.tensors == {
            "a.weight": TensorInfo(torch.float16, (3, 4)),
            "b.bias": TensorInfo(torch.float32, (4,)),
        }
        for key, tensor in tensors.items():
            read = checkpoint.tensor(key)
            assert not read.requires_grad
            torch.testing.assert_close(read, tensor.detach(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrappers",
    [
        ("model",),
        ("module",),
        ("model", "module"),
        ("model", "state_dict"),
        ("state_dict", "module"),
        ("module", "model", "state_dict"),
    ],
    ids="-".join,
)
def test_tensors_within_wrappers_are_read(tmp_path, wrappers):
    path, tensors = tmp_path / "x.ckpt", weights()
    content = tensors
    for wrapper in wrappers:
        content = {wrapper: content, "epoch": 3, "optimizer": {"state": {}}}
    torch.save(content, path)
    assert_read(path, tensors)


def test_wrappers_without_end_are_refused(tmp_path):
    endless = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"x\.ckpt holds no tensor"):
        read_header(tmp_path / "x.ckpt")


def test_a_malicious_pickle_is_refused_and_never_runs(tmp_path):
    marker = tmp_path / "ran"
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": weights(), "extra": Malicious(marker)}, path)
    with pytest.raises(
        CheckpointError, match=r"evil.ckpt is not loaded.*asks for \w+\.system"
    ) as e:
        read_header(path)
    assert "convert it to .safetensors with a tool that you trust" in str(e.value)
    assert not marker.exists()


def test_a_malicious_bare_pickle_is_refused_and_never_runs(tmp_path):
    marker = tmp_path / "ran"
    path = tmp_path / "evil.ckpt"
    path.write_bytes(pickle.dumps({"extra": Malicious(marker)}))
    with pytest.raises(CheckpointError, match=r"evil\.ckpt is "):
        read_header(path)
    assert not marker.exists()


def test_an_object_that_is_no_tensor_is_named(tmp_path):
    path = tmp_path / "trained.ckpt"
    torch.save({"state_dict": weights(), "callbacks": Callback()}, path)
    with pytest.raises(CheckpointError, match=r"asks for [\w.]*test_pickle_reader\.Callback"):
        read_header(path)


@pytest.fixture
def lightning(monkeypatch):
    """Makes a class of Lightning, and its modules for as long as the test runs."""

    def make(name="ModelCheckpoint", module="pytorch_lightning.callbacks.model_checkpoint"):
        kind = type(name, (), {"__module__": module})
        for place in range(len(module.split("."))):
            part = ".".join(module.split(".")[: place + 1])
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        monkeypatch.setattr(sys.modules[module], name, kind, raising=False)
        return kind

    return make


def assert_read(path, tensors):
    with CheckpointReader(path) as checkpoint:
        assert set(checkpoint.header.tensors) == set(tensors)
        for key, tensor in tensors.items():
            assert torch.equal(checkpoint.tensor(key), tensor.detach())


@pytest.mark.parametrize("zipped", [True, False])
def test_callbacks_of_lightning_stand_beside_tensors(tmp_path, lightning, monkeypatch, zipped):
    path, tensors, kind = tmp_path / "trained.ckpt", weights(), lightning()
    callback = kind()
    callback.best = 3
    content = {"state_dict": tensors, "callbacks": {kind: {"best": 1}}, "one": callback}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    assert_read(path, tensors)
    assert not [name for name in sys.modules if name.startswith("pytorch_lightning")]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "value", [np.float64(0.5), np.int64(3), np.dtype("f4"), np.arange(6.0), {1, 2}, torch.float16]
)
def test_values_of_numpy_stand_beside_tensors(tmp_path, value, zipped):
    path, tensors = tmp_path / "trained.ckpt", weights()
    content = {"state_dict": tensors, "best": value}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_read(path, tensors)


class FromNumpy:
    """A tensor as a Mac or a TPU saves it."""

    def __init__(self, array, dtype):
        self.arguments = (array, dtype, "cpu", False)

    def __reduce__(self):
        return torch._utils._rebuild_device_tensor_from_numpy, self.arguments


@pytest.mark.parametrize("code", ["f2", "f4", "f8"])
def test_tensors_saved_as_arrays_are_read(tmp_path, lightning, code):
    array = np.arange(6.0).reshape(2, 3).astype(code)
    content = {
        "x": FromNumpy(array, torch.float32),
        "none": FromNumpy(array[:0], torch.float32),
        "y": lightning()(),
    }
    torch.save(content, tmp_path / "mac.ckpt")
    tensor = torch.from_numpy(array).float()
    assert_read(tmp_path / "mac.ckpt", {"x": tensor, "none": tensor[:0]})


class Call:
    """Has a function called with a value."""

    def __init__(self, function, *values):
        self.reduced = function, values

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("function", "values"),
    [
        (os.system, ("touch {marker}",)),
        (eval, ("open('{marker}', 'w')",)),
        (getattr, (os, "system")),
        (torch.hub.load, ("{marker}", "x")),
        (np.load, ("{marker}",)),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_runs_beside_a_callback(tmp_path, lightning, function, values, zipped):
    marker, path = tmp_path / "ran", tmp_path / "evil.ckpt"
    filled = [v.format(marker=marker) if isinstance(v, str) else v.__name__ for v in values]
    content = {"state_dict": weights(), "a": lightning()(), "b": Call(function, *filled)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"evil\.ckpt is not loaded.*pickles can run any"):
        read_header(path)
    assert not marker.exists()


def test_a_large_number_of_an_object_takes_no_memory(tmp_path):
    numbered = b"\x80\x02}r" + (2**24).to_bytes(4, "little") + b"."
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("x/data.pkl", numbered.replace(b"}", b"cpytorch_lightning\nA\n"))
        archive.writestr("x/version", "3\n")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"x\.ckpt holds a type"):
            read_header(tmp_path / "x.ckpt")
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_a_file_changes_no_function_of_ours(tmp_path):
    """BUILD sets attributes of whatever stands on the stack: here of a function and of a class."""
    for name in ("torch._utils _rebuild_parameter", "numpy dtype", "pytorch_lightning.x Y"):
        target = b"c" + name.replace(" ", "\n").encode() + b"\n"
        stream = io.BytesIO(b"\x80\x02" + target + b"N}X\x01\x00\x00\x00aK\x01s\x86b.")
        with pytest.raises((pickle.UnpicklingError, TypeError)):
            RestrictedUnpickler(stream).load()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([torch.zeros(2)], "holds a list, not a state dict"),
        (torch.zeros(2), "holds a Tensor, not a state dict"),
        ({"epoch": 3}, "holds no tensor"),
        ({}, "holds no tensor"),
    ],
)
def test_pickles_without_a_state_dict_are_refused(tmp_path, content, text):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=rf"x\.ckpt {text}"):
        read_header(tmp_path / "x.ckpt")


@pytest.mark.parametrize("content", [b"garbage", b"PK\x03\x04garbage", b"\x80\x02}.", bytes(100)])
def test_garbage_is_refused(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.ckpt"):
        read_header(tmp_path / "x.ckpt")


def test_a_truncated_pickle_is_refused_at_any_length(tmp_path):
    path = tmp_path / "x.ckpt"
    for zipped in (True, False):
        torch.save(weights(), path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for length in range(1, len(whole) - 1, max(1, len(whole) // 40)):
            path.write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match=r"x\.ckpt is (damaged|not)"):
                read_header(path)


def test_a_zip_archive_that_is_no_checkpoint_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"x\.ckpt is damaged or not a \.ckpt file"):
        read_header(tmp_path / "x.ckpt")


def test_a_safetensors_file_under_this_suffix_is_named(tmp_path):
    text = b'{"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    (tmp_path / "x.ckpt").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match=r"x.ckpt is a .safetensors file by its content"):
        read_header(tmp_path / "x.ckpt")


def test_tensors_that_are_not_dense_count_as_unsupported(tmp_path):
    torch.save({"s": torch.eye(3).to_sparse(), "d": torch.eye(3)}, tmp_path / "x.ckpt")
    header = read_header(tmp_path / "x.ckpt")
    assert list(header.tensors) == ["d"]
    assert list(header.unsupported) == ["s"]


def test_an_archive_is_read_through_a_mapping_that_reserves_no_memory(tmp_path, monkeypatch):
    path, tensors = tmp_path / "模型.ckpt", weights()
    torch.save({"state_dict": tensors}, path)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", None)  # which maps privately
    with CheckpointReader(path) as checkpoint:
        read = checkpoint.tensor("a.weight")
    if sys.platform == "linux":
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        assert [line.split()[1] for line in maps if line.endswith(path.name)] == ["r--s"]
    torch.testing.assert_close(read, tensors["a.weight"], rtol=0, atol=0)
    del read, checkpoint
    if sys.platform == "linux":
        assert path.name not in Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.mark.parametrize("harmless", [True, False])
def test_an_archive_that_something_compressed_is_read(tmp_path, harmless):
    path, tensors = tmp_path / "x.ckpt", weights()
    content = {**tensors, "value": 1 if harmless else np.float64(2)}
    torch.save(content, tmp_path / "plain.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "plain.ckpt") as plain,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))
    assert_read(path, tensors)
