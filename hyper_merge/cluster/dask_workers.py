"""Workers of a dask cluster: maps over them in order, with a bounded number of items on the way."""

from __future__ import annotations

import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

from hyper_merge.cluster.calls import Outcome, Program, call, count_running, describe_worker, give
from hyper_merge.errors import ClusterError
from hyper_merge.runtime.remote import AHEAD, Check, RemoteWorker, RemoteWorkers

if TYPE_CHECKING:
    from distributed import Client, Future

_RETRIES: Final = 2  # of what ended with an error that is no refusal, such as a disk that was away
_PAUSE: Final = 0.02  # seconds between two looks at a result
_PATIENCE: Final = 1.0  # seconds of waiting for a result between two checks
_RECOUNT: Final = 5.0  # seconds after which workers are counted again
_NO_WORKER: Final = 300.0  # seconds without any worker: new ones may wait in a queue
_END: Final = 20.0  # seconds for calls to end that nobody waits for

_Common = TypeVar("_Common")
_Item = TypeVar("_Item")
_T = TypeVar("_T")


class DaskWorkers(RemoteWorkers):
    """The workers of the scheduler that a client is connected to."""

    def __init__(self, client: Client) -> None:
        """Takes a client that is connected."""
        self._client = client
        self._slots = 1
        self._counted = -math.inf  # when the slots were, in seconds
        self._seen = time.monotonic()  # when there was a worker

    @property
    def workers(self) -> list[RemoteWorker]:
        """Those that are there now."""
        return [
            RemoteWorker(name, worker.slots, worker.memory)
            for name, worker in self._on_all(describe_worker).items()
        ]

    @property
    def slots(self) -> int:
        """How many items all workers that are there now work on at a time; 1 at least."""
        self._count_slots()
        return self._slots

    @contextmanager
    def mapped(
        self,
        function: Callable[[_Common, _Item, Check], _T],
        common: _Common,
        items: Iterable[_Item],
        check: Check,
    ) -> Iterator[Iterator[_T]]:
        """Gives the results of a function for items, in their order (see `RemoteWorkers`)."""
        owner, program = secrets.token_hex(8), Program.here()
        sent = self._client.submit(give, common, pure=False)
        calls: deque[tuple[_Item, Future]] = deque()

        def submit(item: _Item) -> None:
            arguments = (function, sent, item, owner, program)
            calls.append(
                (item, self._client.submit(call, *arguments, pure=False, retries=_RETRIES))
            )

        def results() -> Iterator[_T]:
            for item in items:
                submit(item)
                while len(calls) > AHEAD * self.slots:
                    yield self._first(calls, check)
            while calls:
                yield self._first(calls, check)

        try:
            yield results()
        finally:
            if calls:
                self._cancel([sent, *(future for _, future in calls)], owner)

    def on_each(self, function: Callable[..., _T], *arguments: Any) -> dict[str, _T]:
        """Returns what a function returns on each worker, by the worker's name."""
        return self._on_all(function, *arguments)

    def _on_all(self, function: Callable[..., _T], *arguments: Any) -> dict[str, _T]:
        self._require_scheduler()
        with self._or_lost():
            answers = self._client.run(function, *arguments, on_error="return")
        for name, answer in answers.items():
            if isinstance(answer, BaseException):
                raise ClusterError(
                    f"the worker {name} fails: {type(answer).__name__}: {answer}",
                    hint="see the worker's log",
                ) from answer
        return dict(answers)

    def _first(self, calls: deque[tuple[Any, Future]], check: Check) -> Any:
        """Returns the result of the first call, and takes the call out once it is there."""
        item, future = calls[0]
        while True:
            check()
            self._count_slots()
            # A result may be lost with its worker before it is fetched.
            outcome = self._outcome(item, future) if future.done() else None
            if outcome is not None:
                break
            time.sleep(_PAUSE)
        calls.popleft()
        if outcome.refusal:
            raise outcome.refusal
        return outcome.result

    def _outcome(self, item: Any, future: Future) -> Outcome | None:
        """Returns the outcome of a call that is done; None where it does not come at once.

        Raises:
            ClusterError: the workers that had it, or the scheduler, are lost.
        """
        from distributed import CancelledError, KilledWorker  # noqa: PLC0415 - an extra
        from distributed import TimeoutError as NotYet  # noqa: PLC0415 - Python 3.10 has two

        try:
            outcome: Outcome = future.result(timeout=_PATIENCE)
        except KilledWorker as error:
            raise ClusterError(
                f"one worker after the other was lost with the same piece of work: {item}",
                hint="most often memory is the cause: see the workers' logs, and give each of them more",
            ) from error
        except CancelledError as error:
            raise self._lost() from error
        except (
            NotYet,
            OSError,
        ):  # also of a connection that broke: then the scheduler is gone soon
            if future.status == "error":  # the function's own
                raise
            return None
        return outcome

    def _cancel(self, futures: list[Future], owner: str) -> None:
        """Ends calls, and returns once none goes on, or the scheduler is lost."""
        with suppress(OSError, RuntimeError):
            self._require_scheduler()
            self._client.cancel(futures, force=True)
            end = time.monotonic() + _END
            while time.monotonic() < end:
                counts = self._client.run(count_running, owner, on_error="ignore")
                if not any(counts.values()):
                    return
                time.sleep(_PAUSE)

    def _count_slots(self) -> None:
        """Counts the slots of all workers now and then.

        Raises:
            ClusterError: the scheduler is lost, or there has been no worker for a long time.
        """
        self._require_scheduler()
        now = time.monotonic()
        if now < self._counted + _RECOUNT:
            return
        with self._or_lost():
            count = sum(self._client.nthreads().values())
        self._slots, self._counted = max(count, 1), now
        self._seen = now if count else self._seen
        if now > self._seen + _NO_WORKER:
            raise ClusterError(
                f"all workers are lost, and none has come for {_NO_WORKER:.0f} seconds",
                hint="no file was changed; start workers again, and run again",
            )

    def _require_scheduler(self) -> None:
        """Returns if the scheduler is there: with the connection to it, all results are lost."""
        if self._client.status != "running":
            raise self._lost()

    @contextmanager
    def _or_lost(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            raise self._lost() from error

    def _lost(self) -> ClusterError:
        address = self._client.scheduler.address if self._client.scheduler else "of the cluster"
        return ClusterError(
            f"the scheduler {address} is gone",
            hint="no file was changed; start it again, and run again",
        )
