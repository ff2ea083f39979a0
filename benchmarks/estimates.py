"""Time and memory of merges as foretold, beside what they take: families, counts, sizes, cache states.

    python benchmarks/estimates.py [--folder FOLDER] [--only WORD ...] [--threads N] [--cpu-seconds]

Makes families of made-up checkpoints of a few hundred megabytes where they are not there yet, merges
each at the default settings and in other sizes, from nothing and with what the cache has, every merge
in a process of its own, and prints a table. Fails where a time is more than 1.5 times or less than
two thirds of the foretold one and more than five seconds away from it, or the memory a fifth.

On a machine that does other work as well `--threads 1 --cpu-seconds` compares processor seconds with
one thread, which is what an idle machine would take by the clock with one thread.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from full_size import make_family
from measure import anonymous_bytes
from tables import table

from hyper_merge.operations.merge.estimate import estimate_merge
from hyper_merge.operations.merge.merge import run_merge
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.recipe.default_ranks import default_ranks
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime import throughput
from hyper_merge.runtime.progress import Progress
from hyper_merge.synthetic.writer import FamilySpec

TIME_FACTOR, TIME_SLACK, MEMORY_FACTOR = 1.5, 5.0, 1.2
HEADS = ("family", "k", "merge", "foretold s", "s", "ratio", "foretold GB", "GB", "ratio")

FAMILIES = {
    "sd1, half": FamilySpec(width=160, context=384),
    "sd2, half": FamilySpec(architecture="sd2", width=160, context=512),
    "sdxl, quarter": FamilySpec(
        architecture="sdxl", width=96, context=192, second_context=320, vocabulary=12000
    ),
    "sd1, narrow": FamilySpec(width=64, context=160, vocabulary=100, vae_width=16),
    "sd1, half, two": FamilySpec(count=2, width=160, context=384),
    "sd1, half, eight": FamilySpec(count=8, width=160, context=384),
}
# Ranks as at full size, none for the default, and other settings. One after the other in the same folder: all but the last
# find the average and the analysis of the first.
MERGES: dict[str, tuple[tuple[int, ...], dict[str, str]]] = {
    "default": ((), {}),
    "other ranks": ((96, 48, 24), {}),
    "one LoRA": ((64,), {}),
    "even ranks": ((), {"allocation": "even"}),
    "plain, wider bases": ((512, 256), {"layer_weights": "plain"}),
}
_SHORT = ("default", "other ranks")
_FULL_WIDTH = 320
_IN_FULL = "sd1, half"


@dataclass(frozen=True)
class Held:
    """What was foretold of a merge, and what it took."""

    family: str
    count: int
    merge: str
    foretold: float  # seconds
    took: float
    foretold_memory: int  # bytes
    peak: int

    @property
    def is_good(self) -> bool:
        """Whether both are near enough."""
        far = not 1 / TIME_FACTOR <= self.took / self.foretold <= TIME_FACTOR
        is_late = far and abs(self.took - self.foretold) > TIME_SLACK
        ratio = self.peak / self.foretold_memory
        return not is_late and 1 / MEMORY_FACTOR <= ratio <= MEMORY_FACTOR

    @property
    def cells(self) -> tuple[str, ...]:
        """Its row of the table."""
        gigabytes = (self.foretold_memory / 1e9, self.peak / 1e9)
        return (
            *(self.family, str(self.count), self.merge),
            *(f"{self.foretold:.1f}", f"{self.took:.1f}", f"{self.took / self.foretold:.2f}"),
            *(f"{size:.2f}" for size in gigabytes),
            f"{gigabytes[1] / gigabytes[0]:.2f}",
        )


def main() -> int:
    """Runs all merges and prints the table."""
    options = _options()
    rows: list[Held] = []
    for name, spec in FAMILIES.items():
        if not all(word in name for word in options.only):
            continue
        stem = name.replace(", ", "-")
        paths = make_family(options.folder, spec, stem)
        out = options.folder / f"estimates-{stem}"
        shutil.rmtree(out, ignore_errors=True)
        for merge in MERGES if name == _IN_FULL else _SHORT:
            row = _in_a_process(options, paths, out, _settings(merge, spec))
            rows.append(Held(name, spec.count, merge, *row))
            print("  ".join(rows[-1].cells), file=sys.stderr, flush=True)
        shutil.rmtree(out)
    print(table(HEADS, [row.cells for row in rows]))
    return 0 if rows and all(row.is_good for row in rows) else 1


def _settings(merge: str, spec: FamilySpec) -> dict[str, str]:
    """Returns a merge's settings, with ranks that suit the family's width."""
    ranks, others = MERGES[merge]
    full = ranks or default_ranks(spec.count)
    narrower = (max(1, rank * spec.width // _FULL_WIDTH) for rank in full)
    name = merge.replace(",", "")
    return {"name": name, "ranks": " ".join(map(str, narrower)), **others}


def _in_a_process(
    options: argparse.Namespace, paths: Sequence[Path], out: Path, settings: dict[str, str]
) -> tuple[float, float, int, int]:
    run = partial(_merge, options.threads, options.cpu_seconds, paths, out, settings)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run)


def _merge(
    threads: int, cpu_seconds: bool, paths: Sequence[Path], out: Path, settings: dict[str, str]
) -> tuple[float, float, int, int]:
    """Returns seconds and bytes, each as foretold and as it came."""
    torch.set_num_threads(threads)
    clock = time.process_time if cpu_seconds else time.perf_counter
    if cpu_seconds:
        throughput.time.perf_counter = time.process_time  # type: ignore[attr-defined]
    files = {"models": list(map(str, paths)), "output": str(out)}
    recipe = Recipe.parse({**files, **settings}, lambda key: key)
    preflight = run_preflight(recipe)
    foretold = estimate_merge(preflight)
    peaks, ends = [0], threading.Event()

    def watch() -> None:
        while not ends.wait(0.02):
            peaks.append(max(peaks.pop(), anonymous_bytes()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = clock()
    try:
        run_merge(preflight, Progress())
    finally:
        took = clock() - start
        ends.set()
        watcher.join()
    return foretold.seconds, took, foretold.memory, peaks[0]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data"))
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="of the family's name"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-seconds", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
