"""Pass and solve on workers beside one process: times, the overhead of a piece of work, bytes that travel.

    python benchmarks/cluster.py [--folder FOLDER] [--width N] [--workers N ...] [--rounds N] [--quick]
        [--require FACTOR]

Makes a family of made-up checkpoints where it is not there yet, reads, analyses and solves for LoRAs in one process
with one thread, then on workers of one thread each, and prints a table with the best of some rounds for pass and solve;
fails where analysis, averages, factors or multipliers differ by a bit. The overhead is what a call of nothing
takes from a worker. The figures are to be taken on an idle machine with a core for
every worker: `--require 1.8` fails where the most workers are not so many times as fast in both.

Below the table stands what follows for a hundred SDXL checkpoints on eight workers with 10 Gbit/s to the storage.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from full_size import make_family
from tables import table

from hyper_merge.analysis.basis_widths import sampled_options
from hyper_merge.analysis.cache import analysis_path, required_width
from hyper_merge.analysis.file_layout import analysis_bytes
from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.analysis.remote_pass import analyze_on
from hyper_merge.analysis.store import create_analysis, open_analysis, solutions_path
from hyper_merge.analysis.streaming_pass import (
    PassOptions,
    analyze_in_threads,
    pass_costs,
    stream_layers,
)
from hyper_merge.checkpoints.architectures.detection import require_supported
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.checkpoints.io.header import Header, TensorInfo
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter
from hyper_merge.cluster.opening import ClusterRequest, open_workers
from hyper_merge.decomposition.initialization import SearchEffort
from hyper_merge.operations.merge.estimate import average_bytes
from hyper_merge.operations.merge.file_overhead import FileOverhead
from hyper_merge.operations.merge.preflight import Preflight, run_preflight
from hyper_merge.operations.merge.solving import Search, solve_shared
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.progress import Progress
from hyper_merge.runtime.remote import Check, RemoteWorker, RemoteWorkers
from hyper_merge.runtime.throughput import estimate_seconds
from hyper_merge.solver.metric import Metric
from hyper_merge.synthetic.checkpoint_layouts import sdxl_layout
from hyper_merge.synthetic.writer import FamilySpec

CPU = torch.device("cpu")
RANKS = (128, 64, 32, 16)
WIDTH, CONTEXT_RATIO = 160, 12 / 5  # of the family: SD 1.x at half of its width
HEADS = ("", "workers", "s", "times as fast", "pieces", "ms of overhead", "MB sent", "MB received")
WORKS = ("pass", "solve")
CALLS = 200  # of a function that does nothing
FILES, WORKERS, CORES, BANDWIDTH = 100, 8, 8, 1.25e9  # of the arithmetic; bytes per second

_T = TypeVar("_T")


@dataclass
class Run:
    """A pass or a solve: its time, what it made, and what travelled for it."""

    seconds: float
    digest: str
    pieces: int = 0
    sent: int = 0  # bytes
    received: int = 0

    def row(self, work: str, workers: str, alone: float, overhead: str) -> tuple[str, ...]:
        """Returns a line of the table."""
        if not workers:
            return (work, "", f"{self.seconds:.1f}", "1.00", *[""] * 4)
        travelled = (f"{self.sent / 1e6:.2f}", f"{self.received / 1e6:.2f}")
        pieces = str(self.pieces)
        times = (f"{self.seconds:.1f}", f"{alone / self.seconds:.2f}")
        return (work, workers, *times, pieces, overhead, *travelled)


class CountingWorkers(RemoteWorkers):
    """Workers that note how many bytes go to them and come back, as pickles."""

    def __init__(self, workers: RemoteWorkers) -> None:
        self.inner = workers
        self.pieces = self.sent = self.received = 0

    @property
    def workers(self) -> list[RemoteWorker]:
        """Those that are there now."""
        return self.inner.workers

    @contextmanager
    def mapped(
        self,
        function: Callable[..., _T],
        common: Any,
        items: Iterable[Any],
        check: Check,
    ) -> Iterator[Iterator[_T]]:
        """Gives the results of a function, and counts."""
        self.sent += size_of(common) * self.slots

        def noted() -> Iterator[Any]:
            for item in items:
                self.pieces += 1
                self.sent += size_of(item)
                yield item

        def counted(results: Iterator[_T]) -> Iterator[_T]:
            for result in results:
                self.received += size_of(result)
                yield result

        with self.inner.mapped(function, common, noted(), check) as results:
            yield counted(results)

    @property
    def slots(self) -> int:
        """How many items all workers work on at a time."""
        return self.inner.slots

    def on_each(self, function: Callable[..., _T], *arguments: Any) -> dict[str, _T]:
        """Returns what a function returns on each worker."""
        return self.inner.on_each(function, *arguments)


def main() -> None:
    """Prints the table and the arithmetic."""
    options = parse_options()
    torch.set_num_threads(1)
    spec = FamilySpec(width=options.width, context=int(CONTEXT_RATIO * options.width))
    paths = make_family(options.folder / str(options.width), spec)
    recipe = Recipe("bench", tuple(paths), ranks=RANKS, output=options.folder, device="cpu")
    preflight = run_preflight(replace(recipe, layer_weights="relative"))
    bench = Bench(preflight, options.folder, options.rounds, quick=options.quick)
    bench.passed(None)  # the files are in memory from now on
    alone = bench.runs(None)
    rows = [run.row(work, "", run.seconds, "") for work, run in zip(WORKS, alone, strict=True)]
    faster = 1.0
    for count in options.workers:
        with open_workers(ClusterRequest(count), Progress(), lambda _line: None) as workers:
            overhead = f"{1e3 * call_seconds(workers) * count:.1f}"
            runs = bench.runs(workers)
        for work, run, one in zip(WORKS, runs, alone, strict=True):
            if run.digest != one.digest:
                sys.exit(f"{work}: {count} workers make other files than one process")
            rows.append(run.row(work, str(count), one.seconds, overhead))
        faster = min(one.seconds / run.seconds for run, one in zip(runs, alone, strict=True))
    print(table(HEADS, sorted(rows, key=lambda row: WORKS.index(row[0]))))
    print("\n" + arithmetic())
    if faster < options.require:
        sys.exit(f"expected {options.require} times as fast, got {faster:.2f}")


@dataclass
class Bench:
    """The work that is timed."""

    preflight: Preflight
    folder: Path
    rounds: int
    quick: bool

    def runs(self, workers: RemoteWorkers | None) -> tuple[Run, Run]:
        """Returns the fastest pass and the fastest solve, on workers or in this process."""
        passed = best(self.rounds, lambda: self.passed(workers))
        return passed, best(self.rounds, lambda: self.solved(workers))

    def passed(self, workers: RemoteWorkers | None) -> Run:
        """Makes analysis and average of the files, anew; the analysis stays."""
        inputs, width = self.preflight.inputs, required_width(RANKS)
        options = sampled_options(inputs, PassOptions(CPU, 0, width), Progress())
        cache, average = self.folder / "cache", self.folder / "average.safetensors"
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir()
        self.analysis = analysis_path(cache, inputs, options)
        counting = CountingWorkers(workers) if workers else None
        analyze = analyze_on(counting, cache, with_average=True) if counting else analyze_in_threads
        begin = time.perf_counter()
        with (
            create_analysis(self.analysis, inputs, options) as writer,
            SafetensorsWriter(average, inputs.outputs(), {}) as model,
        ):
            outside = stream_layers(inputs, options, model.write, writer.keep, Progress(), analyze)
            writer.close_with(outside)
        seconds = time.perf_counter() - begin
        digest = hashlib.sha256(self.analysis.read_bytes() + average.read_bytes()).hexdigest()
        average.unlink()
        return counted_run(seconds, digest, counting)

    def solved(self, workers: RemoteWorkers | None) -> Run:
        """Solves for the LoRAs and rounds them, from the analysis of the last pass."""
        preflight, recipe = self.preflight, self.preflight.recipe
        solutions_path(self.analysis).unlink(missing_ok=True)
        counting = CountingWorkers(workers) if workers else None
        effort = SearchEffort.QUICK if self.quick else SearchEffort.FULL
        begin = time.perf_counter()
        with open_analysis(self.analysis, preflight.inputs, workers=counting) as analysis:
            metric, overhead = (
                Metric.of(analysis, recipe),
                FileOverhead.of(recipe, preflight.inputs, preflight.norms_and_biases),
            )
            search = Search(effort=effort)
            solved = solve_shared(metric, preflight, overhead, search, Progress())
            seconds = time.perf_counter() - begin
            digest = hashlib.sha256()
            for pairs in solved.factors.factors:
                for tensor in (part for pair in pairs for part in pair if part.numel()):
                    digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
            for matrix in solved.evaluation.multipliers.values():
                digest.update(matrix.numpy().tobytes())
        return counted_run(seconds, digest.hexdigest(), counting)


def counted_run(seconds: float, digest: str, counting: CountingWorkers | None) -> Run:
    """Returns a run with what travelled."""
    if counting is None:
        return Run(seconds, digest)
    return Run(seconds, digest, counting.pieces, counting.sent, counting.received)


def best(rounds: int, run: Callable[[], Run]) -> Run:
    """Returns the fastest of some runs."""
    return min((run() for _ in range(rounds)), key=lambda one: one.seconds)


def call_seconds(workers: RemoteWorkers) -> float:
    """Returns the seconds that a call of nothing takes, with all workers calling at a time."""
    begin = time.perf_counter()
    with workers.mapped(divmod_of, 7, range(1, CALLS + 1), Progress().check) as results:
        list(results)
    return (time.perf_counter() - begin) / CALLS


def divmod_of(number: int, item: int, _check: Check) -> tuple[int, int]:
    """Returns a little."""
    return divmod(number, item)


def size_of(value: object) -> int:
    """Returns the bytes of a value on its way."""
    return len(pickle.dumps(value))


def arithmetic() -> str:
    """Returns what a pass over many full-size files takes on a cluster, from costs and bytes."""
    shapes = sdxl_layout()
    infos = {key: TensorInfo(torch.float16, tuple(shape)) for key, shape in shapes.items()}
    size = sum(info.nbytes for info in infos.values())
    header = Header(Path("a.safetensors"), infos, {}, size, 0)
    layout = layout_of(header, require_supported(header))
    inputs = MergeInputs((header,) * FILES, None, layout, (1.0,) * FILES, torch.float16)
    options = PassOptions(CPU, 0, required_width(RANKS))
    hours = estimate_seconds(sum(pass_costs(inputs, options).values()), CPU) / 3600
    results = analysis_bytes(inputs, options) + average_bytes(inputs)
    read = FILES * size
    minutes = 2 * read / BANDWIDTH / 60
    lines = (
        f"{FILES} SDXL files, {read / 1e9:.0f} GB; analysis and average {results / 1e9:.0f} GB:",
        f"computing: {hours:.1f} hours of a core like this one, {60 * hours / WORKERS / CORES:.0f}",
        f"minutes on {WORKERS} workers of {CORES} cores;",
        f"reading for hashes and for the pass: {minutes:.0f} minutes through one link of",
        f"{BANDWIDTH / 1e9} GB/s, {minutes / WORKERS:.0f} through one for each worker;",
        f"shards, written, read, and written as files: {3 * results / BANDWIDTH / 60:.0f} minutes,",
        "beside the rest",
    )
    return "\n".join(lines)


def parse_options() -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("bench-cluster"))
    parser.add_argument("--width", type=int, default=WIDTH, help="of the made-up networks")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a short search for a start")
    parser.add_argument("--require", type=float, default=0.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
