"""Finds the devices of this machine, takes one for a job, and lets the CPU do what it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, TypeVar

import torch

from hyper_merge.errors import DeviceError
from hyper_merge.runtime.device_memory import device_room, release_memory
from hyper_merge.runtime.float32_precision import highest_precision
from hyper_merge.runtime.throughput import measure_throughput

CPU: Final = torch.device("cpu")

_T = TypeVar("_T")

# What torch says in a plain RuntimeError where a GPU, its driver or one of its libraries gives up;
# not "cuda", which is also in the errors of code that mixes devices.
_GIVEN_UP: Final = (
    "out of memory",
    "CUDA error",
    "CUDA driver",
    "CUBLAS_STATUS",
    "CUSOLVER_STATUS",
    "cusolver error",
    "CUSPARSE_STATUS",
    "cuDNN error",
    "CUDNN_STATUS",
    "cuDNN version",
    "nvrtc",
    "MAGMA",
    "HIP error",
    "HIPBLAS_STATUS",
    "ROCBLAS_STATUS",
    "MIOPEN",
    "hipErrorNoBinaryForGpu",
    "no kernel image",
    "not compiled with CUDA",
    "NVIDIA driver",
)


_AcceleratorError: Final = getattr(torch, "AcceleratorError", torch.cuda.OutOfMemoryError)


class AutoDevice:
    """Decides which device `auto` is: CUDA where there is one, or what the program around us says.

    Attributes:
        choose: Returns the name of a device, such as `cuda:1`; whatever is neither `cpu` nor CUDA
            counts as `cpu`. A host sets it when it registers the extension.
    """

    def __init__(self) -> None:
        self.choose: Callable[[], str] = _first_device

    def device(self) -> torch.device:
        """Returns the device; the CPU where the choice is not there."""
        name = self.choose()
        with suppress(DeviceError, RuntimeError):
            return _existing_device(name) if name.startswith("cuda") else CPU
        return CPU


def _first_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


AUTO: Final = AutoDevice()
"""The choice of this process."""


def resolve_device(name: str) -> torch.device:
    """Returns the device of a name; `auto` is that of `AUTO`.

    Raises:
        DeviceError: CUDA is requested and absent, or has no device of that number.
    """
    return AUTO.device() if name == "auto" else _existing_device(name)


def _existing_device(name: str) -> torch.device:
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


@contextmanager
def device_job(device: torch.device) -> Iterator[None]:
    """Runs a job on a device: products in full float32, and the memory given back at the end.

    The rate of a GPU is measured here, where nothing else uses it, for the estimates of later jobs.
    """
    if device.type == "cpu":
        yield
        return
    with highest_precision():
        try:
            with suppress(RuntimeError):  # whoever needs the device will find out
                measure_throughput(device)
            yield
        finally:
            release_memory()


def try_device(
    device: torch.device,
    work: Callable[[torch.device], _T],
    nbytes: int = 0,
    on_failure: Callable[[str], None] = lambda _failure: None,
) -> _T:
    """Does some work on a device, and once more on the CPU if the device cannot do it.

    Args:
        device: the device to begin with.
        work: takes the device that it is to use; it has no effect if it raises.
        nbytes: what the work takes of the device's memory at most, as far as it is known. The work
            waits until so much is free beside other work in progress; what can never fit goes to the
            CPU at once, for some drivers would take ordinary memory in its place, at a crawl.
        on_failure: called before the CPU begins with why the device cannot do it: "cuda has too
            little memory", to be followed by "for" and what it was. What it raises leaves the CPU out.
    """
    room = device_room(device)
    failure = f"{device} has too little memory"
    with room.holding(nbytes) as fits:
        if fits:
            try:
                return work(device)
            except RuntimeError as error:
                if not is_device_failure(error, device):
                    raise
                failure = _explain(error, device)
    # Not within `except`: as long as the error is known, its traceback keeps all that the work has
    # on the device.
    release_memory()
    on_failure(failure)
    with room.cpu_turn:
        return work(CPU)


def is_device_failure(error: RuntimeError, device: torch.device) -> bool:
    """Tells whether an error says that the device, its driver or its libraries cannot do something."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, _AcceleratorError)):
        return True
    # On a GPU other algorithms run, which may fail to converge where those of the CPU do not.
    if isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        return device.type != "cpu"
    return any(text in str(error) for text in _GIVEN_UP)


def _explain(error: RuntimeError, device: torch.device) -> str:
    text = str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in text:
        return f"{device} has too little memory"
    reason = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return f"{device} fails ({reason.rstrip('.')})"
