"""What this machine has: devices, and room on its disks."""

from __future__ import annotations

import torch

from hyper_merge.errors import DeviceError


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
            raise DeviceError(f"device {name} was asked for, but {has}", hint="choose auto or cpu")
    return device
