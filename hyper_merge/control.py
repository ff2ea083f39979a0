"""How a long run tells where it stands and hears that it should stop; no screen, no signals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hyper_merge.errors import InterruptedRun


@dataclass(frozen=True)
class Control:
    """What the caller of a run gives it: callables from outside.

    Attributes:
        on_progress: Called with the phase in words and the fraction of the whole run, 0..1.
        should_stop: Asked between steps; true ends the run with `InterruptedRun`.
        warn: Called with a sentence that the user should see, once each.
    """

    on_progress: Callable[[str, float], None] = lambda _phase, _fraction: None
    should_stop: Callable[[], bool] = lambda: False
    warn: Callable[[str], None] = lambda _message: None

    def step(self, phase: str, fraction: float) -> None:
        """Reports a step.

        Raises:
            InterruptedRun: the user wants the run to end.
        """
        if self.should_stop():
            raise InterruptedRun("stopped; no file was changed")
        self.on_progress(phase, fraction)

    def part(self, start: float, end: float) -> Control:
        """The control of a part of the run that takes fractions `start`..`end` of the whole."""

        def on_progress(phase: str, fraction: float) -> None:
            self.on_progress(phase, start + (end - start) * fraction)

        return Control(on_progress, self.should_stop, self.warn)

    def joined(self, other: Control) -> Control:
        """A control that tells both, and stops when either is to stop."""

        def on_progress(phase: str, fraction: float) -> None:
            self.on_progress(phase, fraction)
            other.on_progress(phase, fraction)

        def warn(message: str) -> None:
            self.warn(message)
            other.warn(message)

        return Control(on_progress, lambda: self.should_stop() or other.should_stop(), warn)
