"""How a long run tells where it stands and hears that it should stop; no screen, no signals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import TracebackType
from typing import Any, Final

from hyper_merge.errors import InterruptedRun

STOPPED: Final = "stopped; no file was changed"  # said of a run that the user ended


@dataclass(frozen=True)
class Progress:
    """What the caller of a run gives it: callables from outside.

    Attributes:
        on_progress: Called with the phase in words and the fraction of the whole run, 0..1.
        should_stop: Asked between steps, in any thread; true ends the run with `InterruptedRun`.
        warn: Called with a sentence that the user should see, once each.
    """

    on_progress: Callable[[str, float], None] = lambda _phase, _fraction: None
    should_stop: Callable[[], bool] = lambda: False
    warn: Callable[[str], None] = lambda _message: None

    def check(self) -> None:
        """Returns if the run may go on; in any thread.

        Raises:
            InterruptedRun: the user wants the run to end.
        """
        if self.should_stop():
            raise InterruptedRun(STOPPED)

    def report(self, phase: str, fraction: float) -> None:
        """Reports a step; errors as for `check`."""
        self.check()
        self.on_progress(phase, fraction)

    def part(self, start: float, end: float) -> Progress:
        """The control of a part of the run that takes fractions `start`..`end` of the whole."""

        def on_progress(phase: str, fraction: float) -> None:
            self.on_progress(phase, min(start + (end - start) * fraction, end))

        return Progress(on_progress, self.should_stop, self.warn)

    def joined(self, other: Progress) -> Progress:
        """A control that tells both, and stops when either is to stop."""

        def on_progress(phase: str, fraction: float) -> None:
            self.on_progress(phase, fraction)
            other.on_progress(phase, fraction)

        def warn(message: str) -> None:
            self.warn(message)
            other.warn(message)

        return Progress(on_progress, lambda: self.should_stop() or other.should_stop(), warn)

    def split(self, costs: Sequence[float]) -> list[Progress]:
        """Controls of consecutive parts that take time in proportion to their costs, 0 for none."""
        ends = [end / (sum(costs) or 1.0) for end in accumulate(costs, initial=0.0)]
        return [self.part(min(start, 1.0), min(end, 1.0)) for start, end in pairwise(ends)]

    def counter(self, phase: str, costs: Mapping[Any, float]) -> ProgressCounter:
        """A count of the work on items of known costs, which are one phase of this control."""
        return ProgressCounter(self, phase, costs)


class ProgressCounter:
    """How far a phase is: counted in any thread, told in the run's own. Use as a context manager.

    Whoever still counts when the block is left, which an error can cause too, is stopped.
    """

    def __init__(self, progress: Progress, phase: str, costs: Mapping[Any, float]) -> None:
        """Nothing is done yet.

        Args:
            progress: is told and asked.
            phase: in words.
            costs: what each item takes, in any unit.
        """
        self._control = progress
        self._phase = phase
        self._costs = dict(costs)
        self._done = dict.fromkeys(costs, 0.0)
        self._total = sum(costs.values()) or 1.0
        self._left = False

    def __enter__(self) -> ProgressCounter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._left = True

    def add(self, item: Any, cost: float) -> None:
        """Counts a part of an item; never more than its whole cost, so estimates will do.

        Raises:
            InterruptedRun: the user, or an error elsewhere, wants the run to end.
        """
        if self._left:
            raise InterruptedRun("stopped by what happened elsewhere in this run")
        self._control.check()
        self._done[item] = min(self._done[item] + cost, self._costs[item])

    def finish(self, item: Any) -> None:
        """Counts an item as done, and tells; errors as for `tell`."""
        self._done[item] = self._costs[item]
        self.tell()

    def tell(self) -> None:
        """Reports how far the phase is.

        Raises:
            InterruptedRun: the user wants the run to end.
        """
        self._control.report(self._phase, min(sum(self._done.values()) / self._total, 1.0))


def count(counter: ProgressCounter, item: object, size: int) -> None:
    """Counts bytes of an item, and tells."""
    counter.add(item, size)
    counter.tell()
