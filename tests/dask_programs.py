"""Dask's own programs, as they run on the nodes of a cluster."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from local_server import ADDRESS, find_free_port

ROOT = Path(__file__).parents[1]


@contextmanager
def process(module, *words):
    """Runs one of dask's programs."""
    command = [sys.executable, "-m", f"distributed.cli.{module}", *words]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as program:
        try:
            yield program
        finally:
            program.kill()


def wait_until_open(port):
    end = time.monotonic() + 60
    while not is_open(port):
        assert time.monotonic() < end
        time.sleep(0.1)


def is_open(port):
    try:
        socket.create_connection((ADDRESS, port)).close()
    except OSError:
        return False
    return True


@contextmanager
def running_scheduler():
    """Gives the address of a scheduler without workers, and its process."""
    port = find_free_port()
    words = ("--host", ADDRESS, "--port", str(port), "--no-dashboard")
    with process("dask_scheduler", *words) as program:
        wait_until_open(port)
        yield f"tcp://{ADDRESS}:{port}", program
