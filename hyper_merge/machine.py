"""What this machine has: devices, and room on its disks."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from hyper_merge.errors import DeviceError, OutputError
from hyper_merge.sizes import size_text


def resolve_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA where there is one.

    Raises:
        DeviceError: CUDA is asked for and absent, or has no device of that number.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            has = (
                f"this machine has {found} such devices" if found else "torch finds no CUDA device"
            )
            raise DeviceError(f"device {name} was asked for, but {has}; choose auto or cpu")
    return device


def require_disks(needed: Mapping[Path, int]) -> None:
    """Returns if the disks of all folders, which need not exist yet, have room.

    Args:
        needed: bytes by folder; folders on one disk need room together.

    Raises:
        OutputError: too little is free; says how much of each.
    """
    total: dict[int, int] = {}
    for folder, size in needed.items():
        if not size:
            continue
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        disk = existing.stat().st_dev
        total[disk] = total.get(disk, 0) + size
        free = shutil.disk_usage(existing).free
        if free < total[disk]:
            raise OutputError(
                f"{folder} needs {size_text(total[disk])} but its disk has"
                f" {size_text(free)} free; make room or choose another output folder"
            )
