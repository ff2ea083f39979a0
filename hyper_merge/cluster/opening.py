"""Starts workers on this machine, or connects to a cluster that is there, and refuses what does not fit."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import resource_tracker
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import torch

from hyper_merge.cluster.calls import Program, describe_worker
from hyper_merge.cluster.dask_workers import DaskWorkers
from hyper_merge.errors import ClusterError
from hyper_merge.runtime.progress import Progress

if TYPE_CHECKING:
    from distributed import Client

_SETTINGS: Final = {
    # A worker that is lost takes no item along that it has not begun.
    "distributed.scheduler.worker-saturation": 1.0,
    # On a busy machine a new worker takes longer to come than dask waits, which then gives it up.
    "distributed.comm.timeouts.connect": "120s",
}

_SPAWN: Final = "distributed.nanny.pre-spawn-environ"

# dask has C's allocator return whatever is freed at once. Each tensor then takes new pages, which the system fills
# with zeros: a fifth of a solve's time. What a piece of work leaves behind is returned after it anyway.
_RETURN_AT_ONCE: Final = "MALLOC_TRIM_THRESHOLD_"

_GPUS: Final = "CUDA_VISIBLE_DEVICES"
_LOGGERS: Final = re.compile(r"(distributed|tornado)\b")
_LOCALHOST: Final = "127.0.0.1"
_ANY_PORT: Final = f"{_LOCALHOST}:0"
_REACHED: Final = 10.0  # seconds in which a scheduler answers
_WORKERS: Final = 60.0  # seconds in which the first worker comes


@dataclass(frozen=True)
class ClusterRequest:
    """Which workers are wanted: new ones on this machine, or those of a scheduler.

    Attributes:
        workers: Processes to start on this machine; None with a scheduler.
        scheduler: Address of a scheduler; None with workers.
        memory: Bytes that each new worker may take; None for an even share of the machine's.
    """

    workers: int | None = None
    scheduler: str | None = None
    memory: int | None = None


def require_dask() -> None:
    """Returns if dask.distributed is installed, and what its certificates need.

    Raises:
        ClusterError: one of both is not.
    """
    try:
        import cryptography  # noqa: F401, PLC0415 - an extra
        import distributed  # noqa: F401, PLC0415 - an extra
    except ImportError as error:
        raise ClusterError(
            f"workers need dask.distributed and cryptography, and not both are installed ({error})",
            hint="pip install 'hyper-merge[cluster]'",
        ) from error


@contextmanager
def open_workers(
    request: ClusterRequest, progress: Progress, announce: Callable[[str], None]
) -> Iterator[DaskWorkers]:
    """Gives workers within the block; those that were started for it end with it.

    Args:
        request: which are wanted.
        progress: takes warnings; its check is called while nothing answers.
        announce: called with the address of the dashboard.

    Raises:
        ClusterError: dask is not installed, the scheduler does not answer or has no workers, or a
            process of the cluster has other versions of the programs.
    """
    require_dask()
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        if request.scheduler is None:
            client = stack.enter_context(_local_client(request))
        else:
            client = stack.enter_context(_remote_client(request.scheduler))
        _wait_for_worker(client, progress)
        _require_alike(client, progress)
        if client.dashboard_link:
            announce(f"dashboard of the workers: {client.dashboard_link}")
        yield DaskWorkers(client)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what dask logs and warns of: whatever matters is said as a refusal."""
    names = [name for name in logging.root.manager.loggerDict if _LOGGERS.match(name)]
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"distributed\b")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


@contextmanager
def _local_client(request: ClusterRequest) -> Iterator[Client]:
    """Gives a client of a scheduler in this process, with new workers on this machine."""
    import dask  # noqa: PLC0415 - an extra
    from distributed import Client, Nanny, Scheduler, Security, SpecCluster  # noqa: PLC0415
    from distributed.system import MEMORY_LIMIT  # noqa: PLC0415 - an extra

    count = request.workers or 1
    # Whoever reaches a scheduler runs programs with the rights of its user: not without a certificate.
    security = Security.temporary()
    place = {"host": _LOCALHOST, "protocol": "tls://", "security": security}
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="hyper-merge-"))
        options = {
            **place,
            "nthreads": 1,
            "memory_limit": request.memory or MEMORY_LIMIT // count,
            "dashboard_address": None,
            "silence_logs": logging.CRITICAL,
        }
        workers = {
            number: {"cls": Nanny, "options": {**options, "env": _environment(number)}}
            for number in range(count)
        }
        scheduler = {"cls": Scheduler, "options": {**place, "dashboard_address": _ANY_PORT}}
        settings = {**_SETTINGS, _SPAWN: _spawn_environment(), "temporary-directory": folder}
        stack.enter_context(dask.config.set(settings))
        with _interrupts_held():
            cluster = stack.enter_context(
                SpecCluster(workers, scheduler, security=security, silence_logs=logging.CRITICAL)
            )
        yield stack.enter_context(Client(cluster, set_as_default=False))


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Has no thread or process that is started within the block see Ctrl-C: this one ends them itself.

    A Ctrl-C comes when the block is left.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # whose first start would let the signal through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _spawn_environment() -> dict[str, Any]:
    """Returns what dask puts into the environment of each new worker, without the allocator's setting."""
    import dask  # noqa: PLC0415 - an extra

    return {key: value for key, value in dask.config.get(_SPAWN).items() if key != _RETURN_AT_ONCE}


def _environment(number: int) -> dict[str, str]:
    """Returns what a new worker finds in its environment: its own GPU, where there are some."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return {}
    chosen = os.environ.get(_GPUS)  # that this process sees, of all
    names = chosen.split(",")[:count] if chosen else [str(gpu) for gpu in range(count)]
    return {_GPUS: names[number % count]}


@contextmanager
def _remote_client(address: str) -> Iterator[Client]:
    from distributed import Client  # noqa: PLC0415 - an extra
    from distributed.comm import get_address_host_port  # noqa: PLC0415 - an extra

    try:
        host, port = get_address_host_port(address, strict=True)
        # A client that finds nobody stays for half a minute after its error.
        socket.create_connection((host, port), timeout=_REACHED).close()
        client = Client(address, timeout=_REACHED, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no scheduler answers at {address}: {error}",
            hint="give the address that it shows when it starts, such as tcp://10.0.0.1:8786",
        ) from error
    with client:
        yield client


def _wait_for_worker(client: Client, progress: Progress) -> None:
    """Returns once there is a worker.

    Raises:
        ClusterError: none came.
    """
    from distributed import TimeoutError as NotYet  # noqa: PLC0415 - Python 3.10 has two

    steps = int(_WORKERS)
    for _ in range(steps):
        progress.report("waiting for workers", 0.0)
        try:
            client.wait_for_workers(1, timeout=_WORKERS / steps)
        except NotYet:
            continue
        return
    raise ClusterError(
        f"the scheduler {client.scheduler.address} has no worker after {_WORKERS:.0f} seconds",
        hint=f"start some, such as with: dask worker {client.scheduler.address}",
    )


def _require_alike(client: Client, progress: Progress) -> None:
    """Returns if all workers have the versions of this process.

    Raises:
        ClusterError: one has others, or lacks the program.
    """
    try:
        programs = {"the scheduler": client.run_on_scheduler(Program.here)}
    except ImportError as error:
        programs = {"the scheduler": error}
    answers: Mapping[str, Any] = client.run(describe_worker, on_error="return")
    programs |= {f"the worker {name}": answer for name, answer in answers.items()}
    for name, answer in programs.items():
        _require_program(name, answer)
    capabilities = {answer.capability for answer in answers.values()}
    capabilities.add(torch.backends.cpu.get_cpu_capability())
    if len(capabilities) > 1:
        progress.warn(
            f"the workers' CPUs differ ({', '.join(sorted(capabilities))}): the last digits of what they"
            " compute may too"
        )


def _require_program(name: str, answer: Any) -> None:
    """Returns if a process has the versions of this one.

    Args:
        name: the process, as the subject of a sentence.
        answer: its description or its program; an error where it cannot tell.

    Raises:
        ClusterError: it has others, or cannot tell.
    """
    here, program = Program.here(), getattr(answer, "program", answer)
    if not isinstance(program, Program):
        raise ClusterError(
            f"{name} does not run hyper-merge ({type(answer).__name__}: {answer})",
            hint=f"install hyper-merge {here.hyper_merge} there, with the extra cluster",
        )
    for part, wanted in asdict(here).items():
        present = asdict(program)[part]
        if present != wanted:
            raise ClusterError(
                f"{name} has {part.replace('_', '-')} {present}, and this process {wanted}",
                hint="install the same version everywhere",
            )
