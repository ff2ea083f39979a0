"""Runs long work in a thread, which outlives the page that began it and can be followed from others."""

from __future__ import annotations

import functools
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any, Final, Literal

from hyper_merge.errors import HyperMergeError, InterruptedRun
from hyper_merge.runtime.progress import STOPPED, Progress

_KNOWN: Final = 20  # jobs that are remembered

Outcome = Literal["running", "done", "stopped", "refused", "failed"]
MERGE: Final = "merge"
"""The place of jobs that make a run; others begin in a panel of the tab "Use"."""
JobFunction = Callable[[str, Progress], object]
"""The work of a job, which takes the task's id and a progress to report to.

It returns the name of the run that it made, an outcome for a panel, or "".
"""


class BusyError(HyperMergeError):
    """The refusal of a job because another one is running."""


@dataclass(frozen=True)
class JobStatus:
    """How far a job is, at one moment.

    Attributes:
        task: Id by which the host knows it.
        title: The thing that it makes, as text.
        phase: The present step, as text.
        fraction: Of the whole, 0..1.
        elapsed: Seconds since the work itself began, without waiting for the host.
        outcome: Whether it runs, or how it ended.
        message: Why it ended, unless done.
        notes: Warnings, each once.
        result: Name of the run that was made, an outcome for a panel, or "".
        stopping: Whether it has been asked to stop.
        place: The panel in which it was begun.
    """

    task: str
    title: str
    phase: str = "waiting for the queue"
    fraction: float = 0.0
    elapsed: float = 0.0
    outcome: Outcome = "running"
    message: str = ""
    notes: tuple[str, ...] = ()
    result: object = ""
    stopping: bool = False
    place: str = MERGE

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end at the present pace; None while that is unknown."""
        if self.fraction < 0.02 or self.elapsed < 1:
            return None
        return self.elapsed * (1 - self.fraction) / self.fraction


def in_one_line(error: BaseException) -> str:
    """Returns an error's kind and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


class Job:
    """A piece of work that runs in a thread.

    Attributes:
        id: Unique among all jobs.
        form: What a screen's form held when it was begun, for a page that comes later; None where
            it was begun elsewhere.
        started: When it was begun, in seconds since 1970.
    """

    def __init__(
        self,
        title: str,
        work: JobFunction,
        log: Callable[[BaseException], None],
        place: str = MERGE,
        form: object = None,
    ) -> None:
        """Starts the work.

        Args:
            title: the thing that it makes, as text.
            work: runs in the thread.
            log: takes an unexpected error.
            place: the panel in which it is begun.
            form: what a screen's form holds.
        """
        self.form = form
        self.started = datetime.now(timezone.utc).timestamp()
        self.id = uuid.uuid4().hex[:12]
        self._changed = threading.Condition()
        self._status = JobStatus(f"task(hyper-merge-{self.id})", title, place=place)
        self._began: float | None = None
        self._work, self._log = work, log
        threading.Thread(target=self._run, name="hyper-merge", daemon=True).start()

    @property
    def status(self) -> JobStatus:
        """How far the job is at this moment."""
        with self._changed:
            running = self._began is not None and self._status.outcome == "running"
            elapsed = time.monotonic() - (self._began or 0) if running else self._status.elapsed
            return replace(self._status, elapsed=elapsed)

    def stop(self) -> None:
        """Asks the job to end; one that still waits for the host ends at once."""
        with self._changed:
            self._update(stopping=True)
            if self._began is None:
                self._end("stopped", STOPPED)

    def wait(self, seconds: float | None) -> None:
        """Returns when the job has ended, or after that many seconds if they are given.

        It does not return at every step: a solve takes hundreds in a second, and a page that draws
        each of them falls minutes behind and no longer answers a click.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._status.outcome != "running", seconds)

    def _run(self) -> None:
        try:
            progress = Progress(self._on_progress, self._should_stop, self._on_warning)
            self._end("done", "", self._work(self._status.task, progress))
        except InterruptedRun as error:
            self._end("stopped", str(error))
        except HyperMergeError as error:
            self._end("refused", str(error))
        except Exception as error:
            self._log(error)
            self._end("failed", in_one_line(error))

    def _on_progress(self, phase: str, fraction: float) -> None:
        with self._changed:
            if self._began is None:
                self._began = time.monotonic()
            self._update(phase=phase, fraction=fraction)

    def _should_stop(self) -> bool:
        return self._status.stopping

    def _on_warning(self, message: str) -> None:
        with self._changed:
            if message not in self._status.notes:
                self._update(notes=(*self._status.notes, message))

    def _end(self, outcome: Outcome, message: str, result: object = "") -> None:
        elapsed = self.status.elapsed
        with self._changed:
            if self._status.outcome == "running":
                self._update(outcome=outcome, message=message, result=result, elapsed=elapsed)

    def _update(self, **changes: Any) -> None:
        with self._changed:
            self._status = replace(self._status, **changes)
            self._changed.notify_all()


class Jobs:
    """Runs one job at a time, and remembers the last ones."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: deque[Job] = deque(maxlen=_KNOWN)

    @property
    def last(self) -> Job | None:
        """The job that runs, or the one that ran last."""
        known = self.known
        return known[0] if known else None

    @property
    def known(self) -> tuple[Job, ...]:
        """The last jobs, the newest first."""
        return tuple(self._known)

    def require_idle(self) -> None:
        """Returns if no job is running.

        Raises:
            BusyError: a job is running.
        """
        status = self.last.status if self.last else None
        if status is not None and status.outcome == "running":
            raise BusyError(
                f"{status.title} is still being made ({status.fraction:.0%})",
                hint="wait for it, or stop it",
            )

    def start(
        self,
        title: str,
        work: JobFunction,
        log: Callable[[BaseException], None],
        place: str = MERGE,
        form: object = None,
    ) -> Job:
        """Begins a job; the arguments are those of `Job`.

        Raises:
            BusyError: another one is running.
        """
        with self._lock:
            self.require_idle()
            job = Job(title, work, log, place, form)
            self._known.appendleft(job)
            return job


@functools.cache
def process_jobs() -> Jobs:
    """Returns the jobs of this process: they live on when the host builds its pages again."""
    return Jobs()
