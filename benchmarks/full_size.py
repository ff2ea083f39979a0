"""The whole merge at full size, against the plain job of averaging the same files.

    python benchmarks/full_size.py [--folder FOLDER] [--family sd1] [--count 4] [--allocation even] [--short]

Makes a family of full-size checkpoints (SD 1.x 2.1 GB each, SDXL 6.9 GB) where it is not there yet,
warms the file cache, and prints a table of times as ratios, peak anonymous memory, and losses. On two
cores it takes about ten minutes for four checkpoints of SD 1.x.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from measure import Measured, measure

from hyper_merge.checkpoints.reader import read_header
from hyper_merge.synthetic.writer import FamilySpec, write_family

RANKS = ("128", "64", "32", "16")
OTHER_RANKS = ("96", "48", "24")
SPECS = {
    "sd1": FamilySpec(),
    "sd2": FamilySpec(architecture="sd2", context=1024),
    "sdxl": FamilySpec(architecture="sdxl"),
}


def main() -> None:
    """Runs every step and prints the table."""
    options = _options()
    paths = warm_family(options.folder, options.family, options.count)
    out = options.folder / f"out-{options.family}-{options.count}"
    shutil.rmtree(out, ignore_errors=True)
    plain_file = options.folder / "plain.safetensors"
    plain = _best([sys.executable, "benchmarks/plain_job.py", str(plain_file), *map(str, paths)], 2)
    plain_file.unlink()
    job = ("--models", *map(str, paths), "--output", str(out), "--create")
    plainly = ("--layer_weights", "plain", "--lora_dtype", "same")  # as the losses in the docs
    spread = ("--allocation", options.allocation, *plainly)
    _row("plain job", plain, plain)
    average = _run("average", "--name", "alone", *job)
    _row("average", average, plain)
    (out / "Stable-diffusion" / "alone.safetensors").unlink()
    first = _run("merge", "--name", "bench", *job, "--ranks", *RANKS, *spread)
    _row("merge", first, plain)
    _per_parameter(first, paths[0])
    if not options.short:
        again = _run("merge", "--name", "bench", *job, "--ranks", *OTHER_RANKS, *spread)
        _row("other ranks", again, plain)
        greedy = (
            "--method",
            "greedy",
            "--iterations",
            "6",
            "--allocation",
            "even",
            "--ranks",
            *RANKS,
            *plainly,
        )
        _row("greedy", _run("merge", "--name", "greedy", *job, *greedy), plain)
        print(f"other ranks / merge: {again.seconds / first.seconds:.2f}")
    print(f"matrix products: {_rate() / 1e9:.0f} GFLOP/s measured in float32")
    for manifest in sorted((out / "hyper-merge").glob("*/manifest.json")):
        report = json.loads(manifest.read_text())["report"]
        print(
            f"{manifest.parent.name}: loss {report['loss']:.4f}, private LoRAs"
            f" {report['private_loss']:.4f}, bound {report['bound']:.4f},"
            f" {len(report['losses'])} sweeps"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data"))
    parser.add_argument("--family", choices=sorted(SPECS), default="sd1")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--allocation", choices=("adaptive", "even"), default="adaptive")
    parser.add_argument("--short", action="store_true", help="the first merge alone")
    return parser.parse_args()


def warm_family(folder: Path, family: str, count: int) -> list[Path]:
    """Returns the paths of a family of `SPECS`, made if need be, whose files lie in the file cache."""
    prefix = "synthetic" if family == "sd1" else f"synthetic_{family}"
    paths = make_family(folder, replace(SPECS[family], count=count), prefix)
    for path in paths:
        with path.open("rb") as stream:
            while stream.read(2**24):
                pass
    return paths


def make_family(folder: Path, spec: FamilySpec, prefix: str = "synthetic") -> list[Path]:
    """Returns the paths of a family in a folder, written if they are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{prefix}_{index}" for index in range(spec.count)]
    paths = [folder / f"{name}.safetensors" for name in names]
    if not all(path.exists() for path in paths):
        write_family(folder, spec, names, overwrite=True)
    return paths


def _run(*arguments: str) -> Measured:
    log = Path(tempfile.gettempdir()) / f"hyper-merge-{arguments[0]}.log"
    result = measure([sys.executable, "-m", "hyper_merge", *arguments], log)
    log.unlink()
    return result


def _best(command: list[str], runs: int) -> Measured:
    return min(
        (measure(command, Path(tempfile.gettempdir()) / "plain.log") for _ in range(runs)),
        key=lambda run: run.seconds,
    )


def _row(name: str, run: Measured, plain: Measured) -> None:
    print(
        f"{name:12} {run.seconds:7.1f} s  {run.seconds / plain.seconds:6.2f} x plain"
        f"  {run.cpu_seconds:7.1f} CPU s  {run.anonymous / 1e9:5.2f} GB anonymous",
        flush=True,
    )


def _per_parameter(run: Measured, path: Path) -> None:
    count = sum(info.numel for info in read_header(path).tensors.values())
    print(
        f"merge: {count / 1e9:.2f} billion numbers a file,"
        f" {run.seconds / count * 1e9:.0f} s and {run.cpu_seconds / count * 1e9:.0f} CPU s a billion"
    )


def _rate() -> float:
    left, right = torch.randn(1280, 2560), torch.randn(2560, 512)
    left @ right
    start = time.perf_counter()
    for _ in range(20):
        left @ right
    return 20 * 2 * left.numel() * right.shape[1] / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
