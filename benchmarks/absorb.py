"""What it takes to absorb a checkpoint into a run, from the cache and by reading everything again.

    python benchmarks/absorb.py [--folder FOLDER] [--count K] [--width CHANNELS]

Makes a family of K + 1 checkpoints in the layout of SD 1.x where it is not there yet (of the first level's
channels; 32 for files of 20 MB), merges K of them, and absorbs the last one twice: from the cached analysis
and by reading all. Before each all files are dropped from the file cache, so that the system counts what is
read from the disk. Prints seconds, processor seconds, memory, bytes read, and the loss that is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from full_size import make_family
from measure import measure
from tables import table

from hyper_merge.synthetic.writer import NARROW

HEADS = ("job", "seconds", "CPU s", "memory MB", "read MB", "loss")


def main() -> None:
    """Runs the jobs and prints the table."""
    options = _options()
    scale = options.width / NARROW.width
    spec = replace(
        NARROW,
        count=options.count + 1,
        width=options.width,
        context=int(48 * scale),
        vae_width=int(16 * scale),
        terms=options.width,
    )
    name = f"absorb-{options.count}-{options.width}"
    *merged, other = make_family(options.folder, spec, name)
    out = options.folder / "absorb-out"
    shutil.rmtree(out, ignore_errors=True)
    folder = ("--output", out)
    ranks = [str(max(round(rank * scale), 1)) for rank in (12, 8, 4, 4)]
    jobs = {
        f"merge of {options.count}": (
            "k", "merge", "--models", *merged, "--name", "k", "--create", "--ranks", *ranks, *folder
        ),
        "absorb --from_cache": ("more", "absorb", "k", other, "--name", "more", "--from_cache", *folder),
        "absorb": ("all", "absorb", "k", other, "--name", "all", *folder),
    }  # fmt: skip
    rows = []
    for job, (run, *arguments) in jobs.items():
        if job == "absorb":  # as if the other had not been
            _forget(out, "more")
        rows.append((job, *_measured(options.folder, out, run, arguments)))
        print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    print(table(HEADS, rows))


def _measured(folder: Path, out: Path, run: str, arguments: list[str | Path]) -> tuple[str, ...]:
    """Runs a command, and returns its figures and the loss of the run that it makes."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    log = Path(tempfile.gettempdir()) / "hyper-merge-absorb.log"
    figures = measure([sys.executable, "-m", "hyper_merge", *map(str, arguments)], log)
    print(next((x for x in log.read_text().splitlines() if "read" in x), ""), file=sys.stderr)
    log.unlink()
    manifest = json.loads((out / "hyper-merge" / run / "manifest.json").read_text())
    return (
        f"{figures.seconds:.1f}",
        f"{figures.cpu_seconds:.1f}",
        f"{figures.anonymous / 1e6:.0f}",
        f"{figures.read / 1e6:.0f}",
        f"{manifest['report']['loss']:.5f}",
    )


def _forget(out: Path, run: str) -> None:
    """Deletes a run, and what the cache has of its checkpoints."""
    for path in [*(out / "hyper-merge" / "cache").glob("*-extended-*")]:
        path.unlink()
    shutil.rmtree(out / "hyper-merge" / run)
    for path in [*(out / "Lora").glob(f"{run}_*"), *(out / "Stable-diffusion").glob(f"{run}.*")]:
        path.unlink()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data"))
    parser.add_argument("--count", type=int, default=8, help="checkpoints of the first merge")
    parser.add_argument("--width", type=int, default=32, help="channels; SD 1.x has 320")
    return parser.parse_args()


if __name__ == "__main__":
    main()
