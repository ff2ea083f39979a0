"""Devices, disks and speed of the machine."""

from pathlib import Path

import pytest
import torch

from hyper_merge.errors import DeviceError, HyperMergeError
from hyper_merge.runtime.devices import resolve_device
from hyper_merge.runtime.disks import require_disks
from hyper_merge.runtime.throughput import measure_throughput


def test_throughput_is_measured_once():
    assert measure_throughput(torch.device("cpu")) == measure_throughput(torch.device("cpu")) > 1e6


def test_absent_cuda_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError) as caught:
        resolve_device("cuda")
    assert str(caught.value) == (
        "device cuda was asked for, but torch finds no CUDA device; choose auto or cpu"
    )
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(DeviceError, match="cuda:1 was asked for, but this machine has 1 such"):
        resolve_device("cuda:1")


def test_missing_folder_counts_to_its_parents_disk(tmp_path):
    require_disks({tmp_path / "not" / "there": 1})
    with pytest.raises(HyperMergeError, match=r"needs 1125899\.91 GB but its disk has [0-9.]+ GB"):
        require_disks({tmp_path / "not" / "there": 2**50})
    require_disks({Path("relative/not/there"): 1})
