"""A merge that ends early, for whatever reason, leaves every file as it was."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_family import (
    Stop,
    layers_of,
    losses,
    merge,
    recipe,
    snapshot,
    tags_of,
    temporaries,
)

from hyper_merge.checkpoints.io import atomic_file
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.errors import InterruptedRun, OutputError
from hyper_merge.operations.merge.average import run_average
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.runtime.progress import Progress

ROOT = Path(__file__).parents[3]


def test_interrupted_merge_changes_no_file(files, started):
    before = snapshot(started)
    changed = [files[2], files[1]]  # another average under the same name
    for at in (0.001, 0.04, 0.3, 0.61, 0.9, 1.0):
        shutil.rmtree(started / "hyper-merge" / "cache", ignore_errors=True)
        stop = Stop(at, "interrupt")
        with pytest.raises(KeyboardInterrupt):
            merge(changed, started, stop.progress, overwrite=True)
        assert stop.late == 0
        assert snapshot(started) == before, at
        assert temporaries(started) == [], at
    finished = merge(changed, started, overwrite=True)  # with whatever the cache holds
    loss, _ = losses(changed, finished, tags_of(finished))
    assert finished.report.loss == pytest.approx(loss, abs=1e-6)


def test_interrupted_first_run_leaves_only_the_cache(files, tmp_path):
    with pytest.raises(InterruptedRun, match="no file was changed"):
        merge(files, tmp_path, Stop(0.9, "stop").progress)
    assert snapshot(tmp_path) == {}
    assert {path.name for path in tmp_path.iterdir()} == {"hyper-merge"}
    assert merge(files, tmp_path).reused_analysis


class StopRequest:
    """Counts the checks of each phase, and requests a stop at the n-th check of one."""

    def __init__(self, phase=None, at=0):
        self.phase, self.at = phase, at
        self.now = "hashing the checkpoints"
        self.checks = Counter()
        self.late = 0

    def on_progress(self, phase, fraction):
        self.now = phase

    def should_stop(self):
        self.checks[self.now] += 1
        stops = self.phase is not None and self.checks[self.phase] >= self.at
        self.late += stops
        return stops

    @property
    def progress(self):
        return Progress(self.on_progress, self.should_stop)


@pytest.mark.parametrize("method", ["joint", "greedy"])
def test_every_phase_stops_on_request(files, tmp_path, method):
    root = tmp_path / "models"
    complete = StopRequest()
    loras = merge(files, root, complete.progress, method=method).loras
    cache = root / "hyper-merge" / "cache"
    shutil.copytree(cache, tmp_path / "cache")
    before = snapshot(root)
    layers = len(layers_of(files[0]))
    assert complete.checks["reading and analysing"] > 5 * layers  # within them too
    assert complete.checks["preparing the LoRAs"] >= layers
    tensors = sum(len(load_file(path)) for path in loras)
    assert complete.checks["writing the LoRAs"] > 4 * tensors  # to stage, hash and write them
    assert complete.checks["solving for the LoRAs"] > 20
    for phase, count in complete.checks.items():
        if phase == "putting the files in place" or (method == "greedy" and phase[:3] != "sol"):
            continue
        for at in {1, count * 9 // 10} - {0}:  # how often varies with the threads
            shutil.rmtree(cache, ignore_errors=True)
            if phase not in ("hashing the checkpoints", "reading and analysing"):
                shutil.copytree(tmp_path / "cache", cache)
            request = StopRequest(phase, at)
            with pytest.raises(InterruptedRun):
                merge(files, root, request.progress, method=method, overwrite=True)
            submitted = max(torch.get_num_threads() + 2, 9)
            assert request.late <= submitted + 1, (phase, at)  # once for each item
            assert snapshot(root) == before, (phase, at)
            assert temporaries(root) == [], (phase, at)


KILLED = """
import os, signal, sys
from pathlib import Path
from hyper_merge.runtime.progress import Progress
from hyper_merge.operations.merge.merge import run_merge
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.recipe.recipe import Recipe

def on_progress(phase, fraction):
    if fraction > float(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

recipe = Recipe(name="mix", models=tuple(map(Path, sys.argv[3:])), ranks=(4, 2), device="cpu",
                output=Path(sys.argv[2]), overwrite=True, method="greedy")
run_merge(run_preflight(recipe), Progress(on_progress))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("at", [0.05, 0.98])  # while files are read, and after that
def test_killed_process_leaves_old_files_and_cache(files, started, at):
    shutil.rmtree(started / "hyper-merge" / "cache")
    before = snapshot(started)
    changed = [files[2], files[1]]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(at), str(started), *map(str, changed)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    after = snapshot(started)
    assert {name: content for name, content in after.items() if name in before} == before
    new = [Path(name) for name in after if name not in before]
    assert new
    assert {name.suffix for name in new} <= {".tmp", ".lock"}  # an unheld lock holds up nobody
    finished = merge(changed, started, overwrite=True, method="greedy")
    assert finished.reused_analysis == (at > 0.9)
    loss, _ = losses(changed, finished, tags_of(finished))
    assert finished.report.loss == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("after", [0, 3, 100, 250])
def test_full_disk_is_reported_and_changes_nothing(files, started, after, monkeypatch):
    before = snapshot(started)
    shutil.rmtree(started / "hyper-merge" / "cache")
    real, written = atomic_file.StagedFile._write_some, []

    def write_some(self, data, offset):
        written.append(offset)
        if len(written) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, data, offset)

    monkeypatch.setattr(atomic_file.StagedFile, "_write_some", write_some)
    with pytest.raises(OutputError, match=r"the disk is full; free some space") as caught:
        merge(files[::-1], started, overwrite=True)
    assert "bytes needed" in str(caught.value)
    assert snapshot(started) == before
    assert temporaries(started) == []


def test_too_small_disk_is_refused_before_work(files, tmp_path, monkeypatch):
    usage = types.SimpleNamespace(total=2**40, used=0, free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(CheckpointReader, "__enter__", lambda self: pytest.fail("work was done"))
    with pytest.raises(OutputError, match=r"needs \d+ MB but its disk has 1 MB free; make"):
        merge(files, tmp_path)
    assert list(tmp_path.iterdir()) == []
    preflight = run_preflight(recipe(files, tmp_path))
    usage.free = 2**10
    with pytest.raises(OutputError, match="its disk has"):
        run_average(preflight, Progress())
