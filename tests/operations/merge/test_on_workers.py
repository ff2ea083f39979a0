"""Merges on real workers: the files of a single process, whatever happens to a worker, or none at all."""

import os
import shutil
import sys
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from dask_programs import process, running_scheduler
from remote_work import GB, PretendedWorkers, kill
from tiny_family import QUERY, Stop, few_of, load, recipe, snapshot, temporaries, write

from hyper_merge.analysis import remote_maps
from hyper_merge.cluster.opening import ClusterRequest, open_workers
from hyper_merge.decomposition.initialization import SearchEffort
from hyper_merge.errors import ClusterError, InterruptedRun, NonFiniteError, OutputError
from hyper_merge.operations.merge import lineage
from hyper_merge.operations.merge.merge import run_merge
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.runtime.progress import Progress

for needed in ("distributed", "cryptography"):
    pytest.importorskip(needed, reason="needs the extra cluster")


@pytest.fixture(scope="module")
def workers():
    """Two workers, processes of their own."""
    with open_workers(ClusterRequest(2, memory=GB), Progress(), lambda _line: None) as two:
        yield two


@pytest.fixture
def files(few_layers):
    """Checkpoints of a few layers: each of them passes between the processes many times."""
    return few_layers


@pytest.fixture
def fixed_date(monkeypatch):
    """Has all merges take place in the same second."""
    monkeypatch.setattr(lineage, "current_time", lambda: "2026-01-01T00:00:00+00:00")


SOLVING, ROUNDING = "solving for the LoRAs", "preparing the LoRAs"


def merge(models, output, workers, progress=None, **settings):
    """Merges on workers, or in this process where there are none."""
    preflight = run_preflight(recipe(models, output, **settings))
    progress = progress or Progress()
    return run_merge(preflight, progress, effort=SearchEffort.QUICK, workers=workers)


def merged_files(models, output, workers, progress=None):
    """Merges, and returns the hashes of all files, those of the cache too; the folder is removed."""
    merge(models, output, workers, progress)
    hashes = everything(output)
    shutil.rmtree(output)
    return hashes


def everything(folder):
    """Returns the hashes of all files, those of the cache too."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


class KillOnce:
    """Kills a worker in each of some phases, once that has begun."""

    def __init__(self, workers, *phases):
        self.workers, self.phases, self.killed = workers, list(phases), []

    def on_progress(self, phase, _fraction):
        if phase in self.phases:
            self.phases.remove(phase)
            self.killed += list(self.workers.on_each(os.getpid).values())[:1]
            kill(self.killed[-1])


class SolveCounter(PretendedWorkers):
    """Calls real workers, and notes the parts of the solve."""

    def __init__(self, workers):
        super().__init__()
        self.inner = workers

    @property
    def workers(self):
        return self.inner.workers

    @contextmanager
    def mapped(self, function, common, items, check):
        def noted():
            for item in items:
                self.items.append(str(item))
                yield item

        with self.inner.mapped(function, common, noted(), check) as results:
            yield results

    def on_each(self, function, *arguments):
        return self.inner.on_each(function, *arguments)


class StopIn(Stop):
    """Ends a run as soon as it is in a phase."""

    def __init__(self, phase, how):
        super().__init__(1.0, how)
        self.phase = phase

    def on_progress(self, phase, _fraction):
        super().on_progress(phase, float(phase == self.phase))


def count_received():
    """Returns how many values of merges a worker has."""
    return len(remote_maps._RECEIVED._names)


def test_the_files_are_those_of_a_single_process(files, tmp_path, workers, fixed_date):
    models = tmp_path / "models"
    expected = merged_files(files, models, None)
    names = {Path(name).name for name in expected}
    assert {"mix.safetensors", "hashes.json", "manifest.json"} < names
    assert any(name.endswith(".analysis.safetensors") for name in names)
    counting = SolveCounter(workers)
    assert merged_files(files, models, counting) == expected
    assert {item.partition(",")[0] for item in counting.items} >= {SOLVING, ROUNDING}
    killing = KillOnce(workers, "reading and analysing", SOLVING, ROUNDING)
    assert merged_files(files, models, workers, Progress(killing.on_progress)) == expected
    assert len(killing.killed) == 3


def test_what_exists_is_used_again(files, tmp_path, workers, fixed_date):
    merge(files, tmp_path, workers)
    before = everything(tmp_path)
    merged = merge(files, tmp_path, workers, name="other", ranks=(3,))
    assert merged.reused_analysis
    for suffix in (".analysis.safetensors", "mix.safetensors"):
        (name,) = (name for name in before if name.endswith(suffix))
        assert everything(tmp_path)[name] == before[name]


@pytest.mark.parametrize("how", ["stop", "interrupt"])
@pytest.mark.parametrize("at", [0.0, 0.2])
def test_an_end_on_request_leaves_nothing(files, tmp_path, workers, how, at):
    stop = Stop(at, how)
    with pytest.raises((InterruptedRun, KeyboardInterrupt)):
        merge(files, tmp_path, workers, stop.progress)
    assert snapshot(tmp_path) == {}
    assert temporaries(tmp_path) == []
    assert stop.late <= 1


@pytest.mark.parametrize("how", ["stop", "interrupt"])
def test_an_end_on_request_in_the_solve_leaves_nothing(files, tmp_path, workers, how):
    merge(files, tmp_path, None)
    before = snapshot(tmp_path)
    stop = StopIn(SOLVING, how)
    with pytest.raises((InterruptedRun, KeyboardInterrupt)):
        merge(files, tmp_path, workers, stop.progress, name="other", ranks=(3, 1))
    assert snapshot(tmp_path) == before
    assert temporaries(tmp_path) == []
    # What workers had received is forgotten, and none of them is at work.
    assert set(workers.on_each(count_received).values()) == {0}


def test_a_single_worker_does_alike_until_its_scheduler_disappears_in_the_solve(
    files, tmp_path, fixed_date
):
    models = tmp_path / "models"
    expected = merged_files(files, models, None)
    with running_scheduler() as (address, program):
        words = (address, "--nthreads", "1", "--no-dashboard", "--memory-limit", "1GB")

        def on_progress(phase, _fraction):
            if phase == SOLVING:
                program.kill()

        with (
            process("dask_worker", *words),
            open_workers(ClusterRequest(scheduler=address), Progress(), lambda _line: None) as one,
        ):
            merge(files, models, one)
            assert everything(models) == expected
            before = snapshot(models)
            with pytest.raises(ClusterError, match=f"the scheduler {address} is gone; no file was"):
                merge(files, models, one, Progress(on_progress), name="other", ranks=(3, 1))
    assert snapshot(models) == before
    assert temporaries(models) == []


def test_private_loras_and_all_kinds_of_weights_are_those_of_a_single_process(
    files, tmp_path, workers, fixed_date
):
    """What else the solver computes for layers, in eight bits, with every metric that there is."""
    settings = {
        "ranks": (3, 2, 2),
        "topup": "2",
        "fit_weights": (1.0, 2.0, 1.0),
        "layer_weights": "output",
        "lora_dtype": "float8",
    }
    hashes = []
    for some in (None, workers):
        merge(files, tmp_path / "models", some, **settings)
        hashes.append(everything(tmp_path / "models"))
        shutil.rmtree(tmp_path / "models")
    assert hashes[0] == hashes[1]


def test_a_refusal_is_that_of_a_single_process(files, tmp_path, state_of, workers):
    state = few_of(state_of(1))
    state[QUERY][0, 0] = float("inf")
    spoilt, messages = write(tmp_path / "spoilt.safetensors", state), []
    for some in (None, workers):
        with pytest.raises(NonFiniteError) as caught:
            merge([files[0], spoilt], tmp_path / "models", some)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert snapshot(tmp_path / "models") == {}
    assert temporaries(tmp_path) == []


@pytest.mark.skipif(
    sys.platform != "linux", reason="a path that one process alone sees is in /proc"
)
def test_files_that_a_worker_does_not_see_are_refused_before_any_work(files, tmp_path, workers):
    copy = shutil.copy(files[0], tmp_path / "here.safetensors")
    folder = os.open(Path(copy).parent, os.O_RDONLY)
    try:
        path = Path(f"/proc/self/fd/{folder}/here.safetensors")
        with pytest.raises(
            ClusterError, match=f"the worker tls://.* does not see {path} .*the same paths"
        ):
            merge([path, files[1]], tmp_path / "models", workers)
    finally:
        os.close(folder)
    assert snapshot(tmp_path / "models") == {}
    assert not (tmp_path / "models/hyper-merge/cache").exists()


def test_shards_count_among_the_needs_of_the_disk(files, tmp_path, monkeypatch):
    needed = []

    def require_disks(sizes):
        needed.append({folder.name: size for folder, size in sizes.items()})
        raise OutputError("full")

    monkeypatch.setattr("hyper_merge.operations.merge.estimate.require_disks", require_disks)
    for workers in (None, PretendedWorkers()):
        with pytest.raises(OutputError, match="full"):
            merge(files, tmp_path, workers)
    alone, shared = needed
    results = alone["cache"] + alone["Stable-diffusion"]
    assert 0.1 * results < shared.pop("cache") - alone.pop("cache") < 0.3 * results
    assert alone == shared


def test_files_of_other_kinds_are_read_alike(files, tmp_path, fixed_date, workers):
    paths = [tmp_path / f"{path.stem}.ckpt" for path in files]
    models = [write(path, load(file)) for path, file in zip(paths, files, strict=True)]
    expected = merged_files(models, tmp_path / "models", None)
    assert merged_files(models, tmp_path / "models", workers) == expected
