"""Reports how far a long run is, and stops it on request; knows no screen and no signals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Final

from hyper_merge.errors import InterruptedRun

STOPPED: Final = "stopped; no file was changed"  # the message of a run that the user ended


@dataclass(frozen=True)
class Progress:
    """The callables by which a run reports to its caller and learns that it should stop.

    Attributes:
        on_progress: Called with the phase as text and the fraction of the whole run, 0..1.
        should_stop: Called between steps, in any thread; true ends the run with `InterruptedRun`.
        warn: Called once with each sentence that the user should see.
    """

    on_progress: Callable[[str, float], None] = lambda _phase, _fraction: None
    should_stop: Callable[[], bool] = lambda: False
    warn: Callable[[str], None] = lambda _message: None

    def check(self) -> None:
        """Returns if the run may continue; may be called in any thread.

        Raises:
            InterruptedRun: the user asked for the run to end.
        """
        if self.should_stop():
            raise InterruptedRun(STOPPED)

    def report(self, phase: str, fraction: float) -> None:
        """Reports a step; raises the errors of `check`."""
        self.check()
        self.on_progress(phase, fraction)

    def part(self, start: float, end: float) -> Progress:
        """Returns the progress of the part of the run between two fractions of the whole."""

        def on_progress(phase: str, fraction: float) -> None:
            self.on_progress(phase, min(start + (end - start) * fraction, end))

        return Progress(on_progress, self.should_stop, self.warn)

    def noted(self, note: str) -> Progress:
        """Returns the progress with a note in brackets after the name of every phase."""

        def on_progress(phase: str, fraction: float) -> None:
            self.on_progress(f"{phase} ({note})", fraction)

        return Progress(on_progress, self.should_stop, self.warn)

    def joined(self, other: Progress) -> Progress:
        """Returns a progress that reports to this one and another, and stops when either should."""

        def on_progress(phase: str, fraction: float) -> None:
            self.on_progress(phase, fraction)
            other.on_progress(phase, fraction)

        def warn(message: str) -> None:
            self.warn(message)
            other.warn(message)

        return Progress(on_progress, lambda: self.should_stop() or other.should_stop(), warn)

    def split(self, costs: Sequence[float]) -> list[Progress]:
        """Returns the progress of each of several consecutive parts, in proportion to their costs.

        Args:
            costs: expected time of each part, in any unit; all may be 0.
        """
        ends = [end / (sum(costs) or 1.0) for end in accumulate(costs, initial=0.0)]
        return [self.part(min(start, 1.0), min(end, 1.0)) for start, end in pairwise(ends)]

    def counter(self, phase: str, costs: Mapping[Any, float]) -> ProgressCounter:
        """Returns a counter of the work on items of known costs, which make up one phase."""
        return ProgressCounter(self, phase, costs)


class ProgressCounter:
    """Counts how far a phase is, in any thread, and reports it in the run's own thread.

    Used as a context manager, it stops every thread that still counts when the block is left, which
    an error can cause too.
    """

    def __init__(self, progress: Progress, phase: str, costs: Mapping[Any, float]) -> None:
        """Starts with nothing done.

        Args:
            progress: reports the fractions, and says whether to stop.
            phase: name of the phase, as text.
            costs: expected time of each item, in any unit.
        """
        self._progress = progress
        self._phase = phase
        self._costs = dict(costs)
        self._done = dict.fromkeys(costs, 0.0)
        self._total = sum(costs.values()) or 1.0
        self._left = False

    def __enter__(self) -> ProgressCounter:
        return self

    def __exit__(self, *_error: object) -> None:
        self._left = True

    def add(self, item: Any, cost: float) -> None:
        """Counts a part of an item; never more than its whole cost, so estimates will do.

        Raises:
            InterruptedRun: the user asked for the run to end, or an error elsewhere ended it.
        """
        if self._left:
            raise InterruptedRun("stopped because another part of this run ended")
        self._progress.check()
        self._done[item] = min(self._done[item] + cost, self._costs[item])

    def finish(self, item: Any) -> None:
        """Counts an item as done, and reports; raises the errors of `report`."""
        self._done[item] = self._costs[item]
        self.report()

    def advance(self, item: Any, cost: float) -> None:
        """Counts a part of an item, and reports; raises the errors of `add`."""
        self.add(item, cost)
        self.report()

    def report(self) -> None:
        """Reports how far the phase is.

        Raises:
            InterruptedRun: the user asked for the run to end.
        """
        self._progress.report(self._phase, min(sum(self._done.values()) / self._total, 1.0))
