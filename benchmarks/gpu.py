"""What a GPU does with merges: whether it is right, how long it takes, where it waits, what it holds.

    python benchmarks/gpu.py [--device cuda:0] [--narrow] [--minutes 10] [--folder FOLDER]

Runs the suite's tests marked `gpu`, then counts what the profiler sees of a small merge, then merges four
full-size SD 1.x checkpoints and three of SDXL, made on the device, with all of its memory, with 12, 8 and
6 GB, and with a training. Prints one table and keeps it in `FOLDER/gpu.md` and, with all figures,
`gpu.json`, after every step; what does not fit into the minutes is left out, and says so. It needs no
network, and 30 GB of disk. `--device cpu --narrow` shows in two minutes that the program itself works.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from device_family import write_family
from full_size import SPECS
from tables import table

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_family import KEPT, TINY  # noqa: E402

from hyper_merge.decomposition.initialization import SearchEffort  # noqa: E402
from hyper_merge.operations.merge.merge import run_merge  # noqa: E402
from hyper_merge.operations.merge.preflight import run_preflight  # noqa: E402
from hyper_merge.recipe.recipe import Recipe  # noqa: E402
from hyper_merge.runtime.progress import Progress  # noqa: E402
from hyper_merge.synthetic.family import NARROW  # noqa: E402

CAPS = (None, 12, 8, 6)  # GB
COUNTS = {"sd1": 4, "sdxl": 3}
ROUNDS = 2  # of a training
HEADS = ("merge", "memory", "seconds", "phases", "loss", "peak GB", "warnings")

# What the profiler calls waits of the CPU for the GPU, and the other calls that cost it time.
CALLS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpyAsync",
    "cudaLaunchKernel",
    "cudaMalloc",
    "aten::_local_scalar_dense",
    "aten::_linalg_eigh",
    "aten::_linalg_svd",
    "aten::linalg_qr",
)

NAME = re.compile(r'"name": "([^"]+)"')


class Bench:
    """The steps, their figures, and the time that is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.is_narrow = torch.device(options.device), options.narrow
        self.folder = options.folder
        self.end = time.monotonic() + 60 * options.minutes
        self.figures: dict[str, object] = {}
        self.rows: list[tuple[str, ...]] = []
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def step(self, name: str, work: Callable[[], object], least: float) -> None:
        """Does a step that takes at least so many seconds, if there is time; an error ends it alone."""
        start = time.monotonic()
        if self.end - start < least:
            self.figures[name] = "left out: no time"
        else:
            try:
                self.figures[name] = work()
            except Exception as error:  # the other steps have something to say
                traceback.print_exc()
                self.figures[name] = f"{type(error).__name__}: {error}"
        print(f"[{time.monotonic() - start:6.1f} s] {name}: {self.figures[name]}", flush=True)
        (self.folder / "gpu.json").write_text(json.dumps(self.figures, indent=1) + "\n")
        if self.rows:
            (self.folder / "gpu.md").write_text(table(HEADS, self.rows) + "\n")


def main() -> None:
    """Runs every step and prints the table."""
    options = _options()
    bench = Bench(options)
    bench.step("machine", lambda: machine(bench.device), 0)
    bench.step("tests", lambda: run_tests(bench), 20)
    bench.step("calls", lambda: count_calls(bench), 10)
    for family in COUNTS:
        models = bench.folder / family
        bench.step(f"{family} files", lambda of=family, at=models: make_files(bench, of, at), 20)
        for cap in CAPS if bench.on_gpu else CAPS[:1]:
            name = f"{family} in {cap or 'all'} GB"
            bench.step(name, lambda of=family, c=cap: merge(bench, of, c), 20)
        name = f"{family}, training {ROUNDS}"
        bench.step(name, lambda of=family: merge(bench, of, None, training=ROUNDS), 20)
        shutil.rmtree(models, ignore_errors=True)
    print(table(HEADS, bench.rows))


def machine(device: torch.device) -> dict[str, object]:
    """Returns what the figures were measured on."""
    known: dict[str, object] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known |= {"name": properties.name, "memory": properties.total_memory}
    return known


def run_tests(bench: Bench) -> str:
    """Returns the last line of the suite's tests for GPUs."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/operations"]
    environment = {**os.environ, "HYPER_MERGE_TEST_DEVICE": str(bench.device), "PYTHONPATH": "."}
    log = bench.folder / "gpu-tests.log"
    with log.open("w") as stream:
        limit = max(bench.end - time.monotonic(), 1) / 2
        subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=stream,
            timeout=limit,
            check=False,
        )
    return log.read_text().strip().splitlines()[-1]


def count_calls(bench: Bench) -> dict[str, int]:
    """Returns how often a merge of some narrow layers waits, copies and launches, by the profiler."""
    models = bench.folder / "calls"
    write_family(models, TINY, "sd1", torch.device("cpu"), KEPT)
    activities = torch.profiler.ProfilerActivity
    kinds = [activities.CPU, activities.CUDA] if bench.on_gpu else [activities.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        run(models, bench.device, (6, 3), SearchEffort.QUICK, iterations=2)
    trace = models / "trace.json"
    profile.export_chrome_trace(str(trace))  # in seconds, where its own tables take minutes
    with trace.open() as lines:
        counts = Counter(name for line in lines for name in NAME.findall(line) if name in CALLS)
    shutil.rmtree(models)
    return dict(counts)


def make_files(bench: Bench, family: str, folder: Path) -> str:
    """Writes a family; returns its size."""
    narrow = replace(NARROW, architecture=family, count=COUNTS[family])
    spec = narrow if bench.is_narrow else replace(SPECS[family], count=COUNTS[family])
    paths = write_family(folder, spec, family, bench.device)
    return f"{sum(path.stat().st_size for path in paths) / 1e9:.2f} GB"


def merge(bench: Bench, family: str, cap: int | None, **settings: Any) -> dict[str, Any]:
    """Merges a family with so many GB of the device's memory; returns the figures."""
    if bench.on_gpu:
        total = torch.cuda.get_device_properties(bench.device).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(
            min((cap or 1e9) * 1e9 / total, 1.0), bench.device
        )
        torch.cuda.reset_peak_memory_stats(bench.device)
    try:
        small = (12, 6, 3), SearchEffort.QUICK
        usual = (128, 64, 32, 16), SearchEffort.FULL
        ranks, effort = small if bench.is_narrow else usual
        figures = run(bench.folder / family, bench.device, ranks, effort, **settings)
    finally:
        if bench.on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0, bench.device)
    peak = torch.cuda.max_memory_allocated(bench.device) / 1e9 if bench.on_gpu else 0.0
    figures["peak GB"] = round(peak, 2)
    phases = ", ".join(f"{phase} {seconds}" for phase, seconds in figures["phases"].items())
    name = ", ".join([family, *(f"{key} {value}" for key, value in settings.items())])
    words = (name, f"{cap} GB" if cap else "all", figures["seconds"], phases, figures["loss"])
    warnings = "; ".join(figures["warnings"]) or "none"
    bench.rows.append((*map(str, words), str(figures["peak GB"]), warnings))
    return figures


def run(
    folder: Path,
    device: torch.device,
    ranks: tuple[int, ...],
    effort: SearchEffort = SearchEffort.FULL,
    **settings: Any,
) -> dict[str, Any]:
    """Runs a merge of all files of a folder from warm files, without a cache."""
    models = tuple(sorted(folder.glob("*.safetensors")))
    for path in models:
        with path.open("rb") as stream:
            while stream.read(2**24):
                pass
    output = folder / "out"
    spent: Counter[str] = Counter()
    last = ["starting", time.perf_counter()]
    warnings: list[str] = []

    def on_progress(phase: str, _fraction: float) -> None:
        now = time.perf_counter()
        spent[last[0]] += now - last[1]
        last[:] = phase, now

    recipe = Recipe("bench", models, ranks=ranks, output=output, device=str(device), **settings)
    start = time.perf_counter()
    progress = Progress(on_progress, warn=warnings.append)
    result = run_merge(run_preflight(recipe), progress, effort=effort)
    seconds = time.perf_counter() - start
    shutil.rmtree(output)
    return {
        "seconds": round(seconds, 1),
        "phases": {phase: round(each, 1) for phase, each in spent.items()},
        "loss": round(result.report.loss, 5),
        "warnings": sorted(set(warnings)),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--narrow", action="store_true", help="small files of the same structure")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data/gpu"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
