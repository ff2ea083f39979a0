"""What every job costs beside the bytes that it must read.

    python benchmarks/jobs.py [--folder FOLDER] [--narrow] [--only JOB ...]

Makes a family of full-size SD 1.x checkpoints where it is not there yet (2.1 GB each; with `--narrow` 17
MB), four to merge and one to fit, and runs each job as its own process. Before it all files are dropped
from the file cache, so that the system counts what a job reads from the disk, read ahead included. Prints
seconds, processor seconds, memory, bytes read, and the bytes of the files that the job is about. Folders
of many checkpoints are made of headers and holes, which take no disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from full_size import SPECS, make_family
from measure import Measured, measure
from tables import table

from hyper_merge.synthetic.writer import NARROW

LISTED, OFFERED = 60, 240  # files that are inspected, and that a page offers
RUN = "bench"
HEADS = ("job", "seconds", "CPU s", "memory MB", "read MB", "of files MB")


class Bench:
    """The files, and the processes that work on them."""

    def __init__(self, folder: Path, *, narrow: bool) -> None:
        spec = replace(NARROW if narrow else SPECS["sd1"], count=5)
        *self.merged, self.other = make_family(folder, spec, "jobs-narrow" if narrow else "jobs")
        self.out = folder / "jobs-out"
        for left in (self.out, *folder.glob("jobs-[0-9]*")):
            shutil.rmtree(left, ignore_errors=True)
        self.folder, self.rows = folder, list[tuple[str, ...]]()

    def listed(self, count: int) -> list[Path]:
        """Returns so many paths in a models folder of their own: files with a header and holes."""
        models = self.folder / f"jobs-{count}" / "Stable-diffusion"
        shutil.rmtree(models.parent, ignore_errors=True)
        models.mkdir(parents=True)
        (models.parent / "Lora").mkdir()
        paths = [models / f"model-{place:03d}.safetensors" for place in range(count)]
        size = self.other.stat().st_size
        with self.other.open("rb") as file:
            length = file.read(8)
            header = file.read(int.from_bytes(length, "little"))
        for path in paths:
            path.write_bytes(length + header)
            os.truncate(path, size)
        return paths

    def run(self, job: str, about: Iterable[Path], *arguments: str | Path) -> None:
        """Runs a command and adds its row."""
        log = Path(tempfile.gettempdir()) / "hyper-merge-job.log"
        command = [sys.executable, "-m", "hyper_merge", *map(str, arguments)]
        self._drop_from_cache()
        self._add(job, measure(command, log), about)
        log.unlink()

    def open_page(self, job: str, paths: list[Path]) -> None:
        """Starts the app over these checkpoints, and adds a row of what the page takes until it is there."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        models = paths[0].parent.parent
        command = [sys.executable, "-m", "hyper_merge", "app", str(models), "--port", str(port)]
        app = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            started = _seconds(lambda: _wait_for(port))
            again = _seconds(lambda: _get(port))
        finally:
            app.terminate()
            app.wait()
        self.rows.append((f"{job}, from the command on", f"{started:.2f}", "", "", "", ""))
        self.rows.append((f"{job}, again", f"{again:.2f}", "", "", "", ""))

    def _drop_from_cache(self) -> None:
        os.sync()
        for path in self.folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _add(self, job: str, run: Measured, about: Iterable[Path]) -> None:
        size = sum(path.stat().st_size for path in about)
        figures = (run.anonymous, run.read, size)
        cells = (
            f"{run.seconds:.2f}",
            f"{run.cpu_seconds:.2f}",
            *(f"{x / 1e6:.0f}" for x in figures),
        )
        self.rows.append((job, *cells))
        print(job, *cells, sep="  ", file=sys.stderr, flush=True)


def main() -> None:
    """Runs every job and prints the table."""
    options = _options()
    bench = Bench(options.folder, narrow=options.narrow)
    for job, run in _jobs(bench).items():
        if not options.only or job in options.only:
            run()
    print(table(HEADS, bench.rows))


def _jobs(bench: Bench) -> Mapping[str, Callable[[], None]]:
    """Returns the jobs by name, in their order: later ones need the run of the merge."""
    out = ("--output", bench.out, "--overwrite")
    merge = ("--models", *bench.merged, *out, "--create")
    ranks = ("24", "12", "6") if bench.merged[0].stat().st_size < 2**28 else ("96", "48", "24")

    def loras() -> list[Path]:
        return [*(bench.out / "Stable-diffusion").glob("*"), *(bench.out / "Lora").glob("*.saf*")]

    def cached() -> list[Path]:
        return [path for path in (bench.out / "hyper-merge").rglob("*") if path.is_file()]

    first = bench.merged[0].stem
    return {
        "version": lambda: bench.run("version", (), "--version"),
        "inspect": lambda: bench.run(f"inspect {LISTED}", (), "inspect", *bench.listed(LISTED)),
        "plan": lambda: bench.run("plan", bench.merged, "plan", *merge),
        "average": lambda: bench.run("average", bench.merged, "average", "--name", "mean", *merge),
        "merge": lambda: bench.run("merge", bench.merged, "merge", "--name", RUN, *merge),
        "again": lambda: bench.run(
            "merge, other ranks", cached(), "merge", "--name", RUN, *merge, "--ranks", *ranks
        ),
        "fit": lambda: bench.run("fit", [bench.other, *loras()], "fit", RUN, bench.other, *out),
        "restore": lambda: bench.run("restore", loras(), "restore", RUN, first, *out),
        "export": lambda: bench.run("export", loras(), "export", RUN, first, *out),
        "extract": lambda: bench.run(
            "extract", bench.merged[:2], "extract", *bench.merged[:2], *out
        ),
        "page": lambda: bench.open_page(f"page with {OFFERED}", bench.listed(OFFERED)),
    }


def _seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def _wait_for(port: int) -> None:
    while not _answers(port):
        time.sleep(0.05)


def _answers(port: int) -> bool:
    try:
        _get(port)
    except OSError:
        return False
    return True


def _get(port: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as answer:
        answer.read()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data"))
    parser.add_argument("--narrow", action="store_true", help="files of 17 MB")
    parser.add_argument("--only", nargs="+", default=(), metavar="JOB")
    return parser.parse_args()


if __name__ == "__main__":
    main()
