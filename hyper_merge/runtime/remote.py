"""Describes other processes, on this machine or on others, that take work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

_Common = TypeVar("_Common")
_Item = TypeVar("_Item")
_T = TypeVar("_T")

Check = Callable[[], None]
"""Returns if the work may continue; raises `InterruptedRun` otherwise."""

AHEAD: Final = 3
"""Items for each slot that are in progress, wait, or have results that were not taken yet."""


@dataclass(frozen=True)
class RemoteWorker:
    """A process that takes work."""

    name: str  # as people find it: its address
    slots: int  # items that it works on at a time
    memory: int | None  # bytes beyond which it is ended; None for no limit


class RemoteWorkers(ABC):
    """Other processes that call functions, which can be pickled together with what they take.

    Those on other machines see the same files by the same paths.
    """

    @property
    @abstractmethod
    def workers(self) -> list[RemoteWorker]:
        """Those that are there now."""

    @property
    def slots(self) -> int:
        """How many items all workers that are there now work on at a time; 1 at least."""
        return max(sum(worker.slots for worker in self.workers), 1)

    @abstractmethod
    def mapped(
        self,
        function: Callable[[_Common, _Item, Check], _T],
        common: _Common,
        items: Iterable[_Item],
        check: Check,
    ) -> AbstractContextManager[Iterator[_T]]:
        """Gives the results of a function for items, in their order.

        What a lost worker did not bring to its end another one begins anew, so the function returns
        the same whenever it is called. When the block is left, no call of it goes on anywhere.

        Args:
            function: takes what is common, an item, and a check that it calls several times a second.
            common: is sent to each worker once.
            items: `AHEAD` for each slot are sent at a time; as text they say what they are.
            check: called in the caller's thread while it waits; may raise, which ends the work.

        Raises:
            ClusterError: the workers cannot be reached any more, or several were lost one after the
                other with the same item.
            HyperMergeError: the function refused an item.
        """

    @abstractmethod
    def on_each(self, function: Callable[..., _T], *arguments: Any) -> dict[str, _T]:
        """Returns what a function returns on each worker, by the worker's name.

        Raises:
            ClusterError: a worker cannot call it, or is lost.
        """
