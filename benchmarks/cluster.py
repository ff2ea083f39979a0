"""A pass on workers beside one process: times, the overhead of a piece of work, bytes that travel.

    python benchmarks/cluster.py [--folder FOLDER] [--width N] [--workers N ...] [--rounds N] [--require FACTOR]

Makes a family of made-up checkpoints where it is not there yet, reads and analyses it in one process with one
thread, then on workers of one thread each, and prints a table of the best of some rounds; fails where analysis or
averages differ by a bit. The figures are to be taken on an idle machine with a core for every worker:
`--require 1.8` fails where the most workers are not so many times as fast.

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

from hyper_merge.analysis.basis_widths import choose_widths
from hyper_merge.analysis.cache import analysis_path, required_width
from hyper_merge.analysis.file_layout import analysis_bytes
from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.analysis.remote_pass import analyze_on
from hyper_merge.analysis.store import create_analysis
from hyper_merge.analysis.streaming_pass import (
    AnalyzeTensors,
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
from hyper_merge.operations.merge.estimate import average_bytes
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.progress import Progress
from hyper_merge.runtime.remote import Check, RemoteWorker, RemoteWorkers
from hyper_merge.runtime.throughput import estimate_seconds
from hyper_merge.synthetic.checkpoint_layouts import sdxl_layout
from hyper_merge.synthetic.writer import FamilySpec

CPU = torch.device("cpu")
RANKS = (128, 64, 32, 16)
WIDTH, CONTEXT_RATIO = 160, 12 / 5  # of the family: SD 1.x at half of its width
HEADS = ("pass", "s", "times as fast", "pieces", "ms of overhead", "MB sent", "MB received")
CALLS = 200  # of a function that does nothing
FILES, WORKERS, CORES, BANDWIDTH = 100, 8, 8, 1.25e9  # of the arithmetic; bytes per second

_T = TypeVar("_T")


@dataclass
class Run:
    """A pass: its time, what it made, and what travelled for it."""

    seconds: float
    digest: str
    pieces: int = 0
    sent: int = 0  # bytes
    received: int = 0


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
        items = list(items)
        self.pieces = len(items)
        self.sent = size_of(common) * len(self.workers) + sum(map(size_of, items))

        def counted(results: Iterator[_T]) -> Iterator[_T]:
            for result in results:
                self.received += size_of(result)
                yield result

        with self.inner.mapped(function, common, items, check) as results:
            yield counted(results)

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
    inputs = run_preflight(recipe).inputs
    run_pass(inputs, options.folder, analyze_in_threads)  # the files are in memory from now on
    alone = best(options.rounds, lambda: run_pass(inputs, options.folder, analyze_in_threads))
    rows = [("one process", f"{alone.seconds:.1f}", "1.00", *[""] * 4)]
    faster = 1.0
    for count in options.workers:
        with open_workers(ClusterRequest(count), Progress(), lambda _line: None) as workers:
            overhead = call_seconds(workers) * count
            run = best(options.rounds, lambda: run_on(workers, inputs, options.folder))
        if run.digest != alone.digest:
            sys.exit(f"{count} workers make other files than one process")
        faster = alone.seconds / run.seconds
        row = (f"workers: {count}", f"{run.seconds:.1f}", f"{faster:.2f}", str(run.pieces))
        travelled = (f"{run.sent / 1e6:.2f}", f"{run.received / 1e6:.2f}")
        rows.append((*row, f"{1e3 * overhead:.1f}", *travelled))
    print(table(HEADS, rows))
    print("\n" + arithmetic())
    if faster < options.require:
        sys.exit(f"expected {options.require} times as fast, got {faster:.2f}")


def run_on(workers: RemoteWorkers, inputs: MergeInputs, folder: Path) -> Run:
    """Makes a pass on workers."""
    counting = CountingWorkers(workers)
    cache = folder / "cache"
    cache.mkdir(exist_ok=True)
    run = run_pass(inputs, folder, analyze_on(counting, cache, with_average=True))
    return replace(run, pieces=counting.pieces, sent=counting.sent, received=counting.received)


def run_pass(inputs: MergeInputs, folder: Path, analyze: AnalyzeTensors) -> Run:
    """Makes analysis and average of the files, anew."""
    width = required_width(RANKS)
    options = PassOptions(CPU, 0, width, choose_widths(inputs, width, Progress()))
    cache, average = folder / "cache", folder / "average.safetensors"
    shutil.rmtree(cache, ignore_errors=True)
    path = analysis_path(cache, inputs, options)
    begin = time.perf_counter()
    with (
        create_analysis(path, inputs, options) as writer,
        SafetensorsWriter(average, inputs.outputs(), {}) as model,
    ):
        outside = stream_layers(inputs, options, model.write, writer.keep, Progress(), analyze)
        writer.close_with(outside)
    seconds = time.perf_counter() - begin
    digest = hashlib.sha256(path.read_bytes() + average.read_bytes()).hexdigest()
    shutil.rmtree(cache)
    average.unlink()
    return Run(seconds, digest)


def best(rounds: int, run: Callable[[], Run]) -> Run:
    """Returns the fastest of some runs."""
    return min((run() for _ in range(rounds)), key=lambda one: one.seconds)


def call_seconds(workers: RemoteWorkers) -> float:
    """Returns the seconds that a call of nothing takes from all workers together."""
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
    parser.add_argument("--require", type=float, default=0.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
