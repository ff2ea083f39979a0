"""Runs a command and says how long it took and how much memory it had to itself at the peak."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_BLOCK = 512  # bytes, by which the system counts what was read


@dataclass(frozen=True)
class Measured:
    """One run of a command."""

    seconds: float  # wall clock
    cpu_seconds: float  # user and system
    anonymous: int  # bytes at the peak: memory that is no mapping of a file
    read: int  # bytes, from the disk


def measure(command: Sequence[str], log: Path) -> Measured:
    """Runs a command to its end; its output goes to `log`.

    Raises:
        RuntimeError: it failed; the log says why.
    """
    before, blocks = os.times(), _blocks_read()
    start = time.perf_counter()
    peak = 0
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.05)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: see {log}")
    after = os.times()
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    return Measured(seconds, cpu, peak, (_blocks_read() - blocks) * _BLOCK)


def _blocks_read() -> int:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock


def anonymous_bytes(pid: int | str = "self") -> int:
    """Returns the bytes of a process's memory that is no mapping of a file; 0 where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
