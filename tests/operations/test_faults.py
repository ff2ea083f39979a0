"""Merges, fits, restores and deletions with a fault at their n-th use of the file system lose nothing.

HYPER_MERGE_FAULTS=all tries every use, as `python benchmarks/faults.py` does, which takes long.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "faults.py"
SAMPLE = 4  # faults of each work, whose kinds are others in the next one
OPTIONS = [] if os.environ.get("HYPER_MERGE_FAULTS") == "all" else ["--sample", str(SAMPLE)]


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="processes are forked, files found in /proc"
)
def test_no_fault_of_the_file_system_loses_a_file():
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *OPTIONS],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    number = re.search(r"([\d,]+) faults injected, 0 with a loss", done.stdout)
    assert number, done.stdout
    assert int(number[1].replace(",", "")) >= SAMPLE * 13
