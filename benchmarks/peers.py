"""Averaging four checkpoints: ours against the plain job, sd-mecha and mergekit, in one run.

    python benchmarks/peers.py --peers PYTHON [--folder FOLDER] [--narrow] [--turns 3]

PYTHON is the interpreter of an environment with `sd-mecha` and `mergekit`, of which each is asked for the
mean in float32, written in fp16. Makes four full-size SD 1.x checkpoints where they are not there yet,
warms the file cache, takes turns so that all see the same machine, and prints medians, peak memory, and
each result's distance from the exact mean.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from full_size import make_family, warm_family
from measure import Measured, measure
from safetensors import safe_open
from tables import table

from hyper_merge.synthetic.writer import NARROW

HEADS = ("way", "seconds", "/ plain job", "CPU s", "memory GB", "error")
_MECHA = """
import sys, torch, sd_mecha
*models, output = sys.argv[1:]
mean = sd_mecha.n_average(*map(sd_mecha.model, models))
sd_mecha.merge(mean, output=output, merge_dtype=torch.float32, output_dtype=torch.float16)
"""


def main() -> None:
    """Takes turns and prints the table."""
    options = _options()
    if options.narrow:
        paths = make_family(options.folder, replace(NARROW, count=4), "peers-narrow")
    else:
        paths = warm_family(options.folder, "sd1", 4)
    out = options.folder / "peers-out"
    runs: dict[str, list[Measured]] = {}
    errors: dict[str, float] = {}
    for _ in range(options.turns):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for way, (command, written) in _ways(paths, out, options.peers).items():
            runs.setdefault(way, []).append(measure(command, out / f"{way}.log"))
            errors[way] = _error(written, paths)
            written.unlink()
    plain = median(run.seconds for run in runs["plain job"])
    print(table(HEADS, [_row(way, of_way, plain, errors[way]) for way, of_way in runs.items()]))


def _ways(paths: list[Path], out: Path, peers: str) -> dict[str, tuple[list[str], Path]]:
    """Returns the command of every way, and the file that it writes."""
    models = list(map(str, paths))
    plain, mecha = out / "plain.safetensors", out / "mecha.safetensors"
    ours = ("average", "--name", "ours", "--create", "--output", str(out), "--models", *models)
    sources = "".join(f"  - {{model: {model}, parameters: {{weight: 1.0}}}}\n" for model in models)
    config = out / "mergekit.yaml"
    config.write_text(
        f"merge_method: linear\nmodels:\n{sources}dtype: float32\nout_dtype: float16\n"
    )
    kit = Path(peers).with_name("mergekit-pytorch")
    return {
        "plain job": ([sys.executable, "benchmarks/plain_job.py", str(plain), *models], plain),
        "ours": (
            [sys.executable, "-m", "hyper_merge", *ours],
            out / "Stable-diffusion" / "ours.safetensors",
        ),
        "sd-mecha": ([peers, "-c", _MECHA, *models, str(mecha)], mecha),
        "mergekit": (
            [str(kit), str(config), str(out / "kit"), "--out-shard-size", "99B"],
            out / "kit" / "model.safetensors",
        ),
    }


def _row(way: str, runs: list[Measured], plain: float, error: float) -> tuple[str, ...]:
    seconds, cpu = (
        median(getattr(run, name) for run in runs) for name in ("seconds", "cpu_seconds")
    )
    memory = max(run.anonymous for run in runs) / 1e9
    return (
        way,
        f"{seconds:.1f}",
        f"{seconds / plain:.2f}",
        f"{cpu:.1f}",
        f"{memory:.2f}",
        f"{error:.1e}",
    )


def _error(written: Path, paths: list[Path]) -> float:
    """Returns the largest distance from the mean in float64, of what all files hold, but the VAE."""
    files = [safe_open(path, framework="pt") for path in paths]
    largest = 0.0
    with safe_open(written, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            first = files[0].get_tensor(key)
            if not first.is_floating_point() or key.startswith("first_stage_model."):
                continue
            mean = torch.stack([other.get_tensor(key).double() for other in files]).mean(0)
            largest = max(largest, float((file.get_tensor(key).double() - mean).abs().max()))
    return largest


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", required=True, metavar="PYTHON")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data"))
    parser.add_argument("--narrow", action="store_true", help="files of 17 MB")
    parser.add_argument("--turns", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
