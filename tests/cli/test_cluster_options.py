"""Options for work on several processes: what they refuse, what they make, and their end by Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from local_server import find_free_port
from tiny_family import snapshot, temporaries

from hyper_merge.cli import main as cli

ROOT = Path(__file__).parents[2]

needs_dask = pytest.mark.skipif(
    not all(map(find_spec, ("distributed", "cryptography"))), reason="needs the extra cluster"
)


def merging(models, output, *words):
    """Returns the command of a short merge."""
    command = ["merge", "--name", "mix", "--models", *models, "--output", output, "--create"]
    return [*map(str, command), "--ranks", "4,2", "--iterations", "2", "--device", "cpu", *words]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--workers", "0"),
            "option --workers: expected a whole number from 1 to 1024, got the number 0",
        ),
        (("--workers", "two"), "option --workers: expected a whole number from 1 to 1024, got "),
        (("--workers", "2", "--worker-memory", "much"), "option --worker-memory: expected a size"),
        (("--worker-memory", "4GB"), "--worker-memory is of processes that --workers starts; give"),
        (("--workers", "2", "--scheduler", "tcp://a:1"), "--workers and --scheduler were both giv"),
    ],
)
def test_impossible_options_are_refused(files, tmp_path, capsys, words, message):
    assert cli.main(merging(files, tmp_path / "models", *words)) == 2
    assert capsys.readouterr().err.startswith(f"hyper-merge: {message}")
    assert list(tmp_path.iterdir()) == []


def test_without_dask_the_extra_is_named(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert cli.main(merging(files, tmp_path / "models", "--workers", "2")) == 2
    assert "dask.distributed" in (message := capsys.readouterr().err)
    assert message.endswith("pip install 'hyper-merge[cluster]'\n")
    assert list(tmp_path.iterdir()) == []


@needs_dask
def test_a_scheduler_that_is_not_there_is_refused(files, tmp_path, capsys):
    address = f"tcp://127.0.0.1:{find_free_port()}"
    assert cli.main(merging(files, tmp_path / "models", "--scheduler", address)) == 2
    assert capsys.readouterr().err.startswith(f"hyper-merge: no scheduler answers at {address}")
    assert list(tmp_path.iterdir()) == []


def program(words, **settings):
    """Starts the program as a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "hyper_merge", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **settings,
    )


@needs_dask
def test_a_merge_on_workers_says_where_their_dashboard_is(files, tmp_path):
    # Without a search for a start, for what workers solve is compared in test_on_workers.py.
    words = ("--workers", "1", "--worker-memory", "1GB", "--method", "greedy")
    process = program(merging(files, tmp_path / "models", *words))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert re.search(r"^dashboard of the workers: http://127\.0\.0\.1:\d+/status$", out, re.M)
    assert "\nmix: 3 checkpoints, 2 shared LoRAs\n" in out
    lines = [line for line in err.splitlines() if not re.match(r"[\w ]+: \d+%, ", line)]
    assert lines == []


def listen_to_sigint():
    """A shell's background job ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@needs_dask
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one child")
def test_ctrl_c_ends_all_processes_and_leaves_nothing(files, tmp_path):
    words = (
        "--workers",
        "2",
        "--worker-memory",
        "1GB",
        "--iterations",
        "10000",
        "--tolerance",
        "0",
    )
    models = tmp_path / "models"
    process = program(merging(files, models, *words), preexec_fn=listen_to_sigint)
    deadline = time.monotonic() + 240
    while not list(models.glob("Stable-diffusion/.*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers too
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "hyper-merge: stopped; no file was changed"
    assert "Traceback" not in err
    assert snapshot(models) == {}
    assert temporaries(models) == []
    assert not is_running(process.pid)


def is_running(group):
    """Tells whether a process of a group does more than wait to be forgotten."""
    states = subprocess.run(
        ["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True, check=False
    )
    return any(not state.startswith("Z") for state in states.stdout.split())
