"""Tells how far runs of a network are, by the weights that they read."""

from __future__ import annotations

import threading

from hyper_merge.runtime.progress import Progress


class RunClock:
    """Reports how far the runs are, and stops them on request."""

    def __init__(self, progress: Progress, phase: str, total: float) -> None:
        """Begins, and says so.

        Args:
            progress: progress and interrupt.
            phase: what is reported.
            total: cost of all runs, in any unit.
        """
        self._progress, self._phase, self._total = progress, phase, total
        self._done = 0.0
        # Weights are read in threads of autograd too, on a device; they report nothing themselves.
        self._thread = threading.get_ident()
        progress.report(phase, 0.0)

    def advance(self, cost: float) -> None:
        """Counts work that begins now; raises the errors of `Progress.check`."""
        self._done += cost
        if threading.get_ident() == self._thread:
            self._progress.report(self._phase, min(self._done / (self._total or 1.0), 1.0))
        else:
            self._progress.check()

    def finish(self) -> None:
        """Reports that all is done."""
        self._progress.report(self._phase, 1.0)
