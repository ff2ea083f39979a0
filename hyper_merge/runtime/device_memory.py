"""Keeps work on a GPU within the memory that is free there, and gives memory back."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

import torch

_USABLE: Final = 0.9  # of what is free: the allocator's pieces do not fill it
_CPU_TURNS: Final = 4  # pieces of work at a time that a CPU does in place of a GPU


class DeviceRoom:
    """The free memory of one device, for which pieces of work in several threads wait.

    Attributes:
        cpu_turn: Entered by work that the CPU does in place of the device.
    """

    def __init__(self, device: torch.device) -> None:
        """Takes nothing yet."""
        self._device = device
        self._changed = threading.Condition()
        self._held: list[int] = []
        self._room = 0  # bytes that were free when nothing was held
        self.cpu_turn = threading.BoundedSemaphore(_CPU_TURNS)

    @contextmanager
    def holding(self, nbytes: int) -> Iterator[bool]:
        """Waits until the memory is free beside what others hold, and holds it within the block.

        Yields:
            Whether so much is ever free; nothing is held if not.
        """
        if self._device.type == "cpu":
            yield True
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._fits(nbytes))
            if not self._held:
                self._room = free_memory(self._device)
            fits = self._fits(nbytes)
            if fits:
                self._held.append(nbytes)
        try:
            yield fits
        finally:
            if fits:
                with self._changed:
                    self._held.remove(nbytes)
                    self._changed.notify_all()

    def _fits(self, nbytes: int) -> bool:
        return sum(self._held) + nbytes <= self._room


@functools.cache
def device_room(device: torch.device) -> DeviceRoom:
    """Returns the room of a device, one for all threads of the process."""
    return DeviceRoom(device)


def free_memory(device: torch.device) -> int:
    """Returns the bytes of a GPU that can be taken now, by the driver and in torch's own store.

    No more than what the process may take, where torch (from 2.6 on) tells.
    """
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _device: 1.0)(device)
    return int(_USABLE * min(free + reserved - allocated, fraction * total - allocated))


def release_memory() -> None:
    """Gives the GPU's memory that torch keeps for later back to the driver."""
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # after some errors the device answers nothing any more
            torch.cuda.empty_cache()
