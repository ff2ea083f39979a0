"""Other processes that run commands beside one another, on file systems of several kinds."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Literal

ROOT = Path(__file__).parent.parent

Kind = Literal["locks", "no locks", "windows"]

PROGRAM = """
import contextlib, io, json, os, sys
from pathlib import Path

kind = "locks"
processes = [os.getpid()]

if sys.platform == "linux":
    from windows_files import keep_open_files
    keep_open_files(setattr, lambda: kind == "windows", lambda: processes)

from hyper_merge.cli.main import main
from hyper_merge.errors import HyperMergeError
from hyper_merge.operations.cache import clear_cache
from hyper_merge.runs.folders import Folders
from hyper_merge.runtime import file_lock

def by_ranges(file, *, shared):
    import fcntl, secrets, struct
    # What Windows has: a range of bytes belongs to one opened file alone.
    place, length = (1 + secrets.randbelow(2**30), 1) if shared else (1, 2**30)
    request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, place, length, 0)
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, request)
    except OSError:
        return file_lock.LockState.TAKEN
    return file_lock.LockState.HELD

locks = {
    "locks": file_lock._lock,
    "no locks": lambda file, *, shared: file_lock.LockState.IMPOSSIBLE,
    "windows": by_ranges,
}
removed_while_open = file_lock._REMOVED_WHILE_OPEN

def beside(others):
    processes[1:] = json.loads(others)
    return 0

def become(new):
    global kind
    kind = new
    file_lock._lock = locks[kind]
    file_lock._REMOVED_WHILE_OPEN = removed_while_open and kind != "windows"
    return 0

from hyper_merge.decomposition.initialization import SearchEffort
from hyper_merge.solver import solve
solve.DEFAULT_EFFORT = SearchEffort.QUICK

from hyper_merge.cli import progress_bar
progress_bar.SECONDS_BETWEEN_LINES = 1e9

def clear(root):
    try:
        clear_cache(Folders.under(Path(root)))
    except HyperMergeError as error:
        sys.stderr.write(str(error))
        return 2
    return 0

for line in sys.stdin:
    words = json.loads(line)
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        own = {"clear": clear, "become": become, "beside": beside}.get(words[0])
        code = own(words[1]) if own else main(words)
    print(json.dumps([code, err.getvalue()]), flush=True)
"""


class Other:
    """A process that runs one command after another; a context manager."""

    def __init__(self, environment: dict[str, str]) -> None:
        """Starts it, on a file system with locks."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **environment,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
                "OMP_NUM_THREADS": "1",
            },
        )

    def __enter__(self) -> "Other":
        return self

    def become(self, kind: Kind) -> None:
        """Goes on on a file system of another kind."""
        assert self.run("become", kind) == (0, "")

    def work_beside(self, others: Iterable["Other"]) -> None:
        """Tells it of others that may have its files open."""
        assert self.run("beside", [other._process.pid for other in others]) == (0, "")

    def begin(self, *words: object) -> None:
        """Sends a command, whose end is not waited for."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(word) for word in words]) + "\n")
        self._process.stdin.flush()

    def end(self) -> tuple[int, str]:
        """Waits for the command; returns its exit code and what it wrote on standard error."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the process ended with {self._process.wait()}"
        code, err = json.loads(line)
        return code, err

    def run(self, *words: object) -> tuple[int, str]:
        """Runs a command."""
        self.begin(*words)
        return self.end()

    def kill(self) -> None:
        """Ends the process as the task manager or `kill -9` does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
