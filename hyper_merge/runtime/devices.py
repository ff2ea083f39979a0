"""Finds the devices of this machine."""

from __future__ import annotations

import torch

from hyper_merge.errors import DeviceError


def resolve_device(name: str) -> torch.device:
    """Returns the device of a name; `auto` is CUDA where there is one.

    Raises:
        DeviceError: CUDA is requested and absent, or has no device of that number.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            reason = (
                f"this machine has {count} such devices" if count else "torch finds no CUDA device"
            )
            raise DeviceError(
                f"device {name} was asked for, but {reason}", hint="choose auto or cpu"
            )
    return device


def list_devices() -> list[str]:
    """Returns the names of the devices that can be chosen."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["auto", "cpu", *(f"cuda:{number}" for number in range(count))]
