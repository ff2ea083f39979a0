"""LoRAs as input at full size: many shared as few, and one resized, beside kohya's own script.

    python benchmarks/loras.py [--folder FOLDER] [--count 50] [--rank 32] [--share 0.2] [--attention]
                               [--every 1] [--kohya PATH/networks/resize_lora.py] [--new-rank 8]

Makes LoRAs with every module that kohya's scripts train in SDXL, text encoders and convolutions
included unless `--attention` leaves these out: families of few that share half of their ranks, and
the rest of each its own. Shares them at a part of their bytes, and prints seconds of the clock and of
all cores together, the peak of memory, and what remains of each. Then resizes one of them, and with
`--kohya` lets kohya's script do the same; both results are compared entry by entry. Fails above two
minutes for the shared LoRAs, below ten times kohya's speed, or where the results differ.

kohya's script is not part of this repository. To have it:

    git clone --depth 1 https://github.com/kohya-ss/sd-scripts

It is run by this Python as a program of its own. Of kohya's package `library`, which needs much that is
not installed here, the script takes three small functions that have no part in the work; stand-ins are
put in their place. Its full SVDs take an hour and more for a whole LoRA of SDXL on two cores; with
`--every 40` both ways take one module of forty.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.operations.loras.combine import run_combine
from hyper_merge.operations.loras.known_layers import known_family
from hyper_merge.operations.loras.request import CombineRequest
from hyper_merge.operations.loras.share import preflight_share, run_share
from hyper_merge.operations.loras.text import format_share
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.progress import Progress

SECONDS, FASTER, ALIKE = 120.0, 10.0, 1e-5
_ALIKE_IN_FAMILY = 5  # LoRAs
_STEEPNESS = 0.7
_STAND_INS = {
    "__init__": "",
    "utils": "def setup_logging():\n    pass\n",
    "model_util": "def is_safetensors(path):\n    return path.endswith('.safetensors')\n",
    "train_util": "def precalculate_safetensors_hashes(tensors, metadata):\n    return '', ''\n",
}


@dataclass
class Took:
    """Seconds of the clock, and of all cores together."""

    wall: float = 0.0
    cpu: float = 0.0


def main() -> int:
    """Runs both parts and prints their tables."""
    options = _options()
    with _folder(options.folder) as folder:
        paths = make_loras(folder, options)
        fine = _share(paths, folder, options.share) if options.count > 1 else True
        return 0 if _resize(paths[0], folder, options) and fine else 1


def make_loras(folder: Path, options: argparse.Namespace) -> list[Path]:
    """Returns LoRAs of SDXL, made where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    rank, every = options.rank, options.every
    layers = [layer for layer in known_family("sdxl").layers if not layer.is_end]
    if options.attention:
        layers = [x for x in layers if x.kernel is None and "emb_layers" not in x.module]
    layers, kind = layers[::every], "attention" if options.attention else "all"
    paths = []
    for place in range(options.count):
        path = folder / f"lora-{place:02}-{rank}-{kind}-{every}.safetensors"
        if not path.exists():
            save_file(
                _tensors(layers, place, rank), path, {"ss_base_model_version": "sdxl_base_v1-0"}
            )
        paths.append(path)
    return paths


def _tensors(layers: Sequence[Layer], place: int, rank: int) -> dict[str, Tensor]:
    half, fall = rank // 2, torch.arange(1, rank // 2 + 1).float() ** -_STEEPNESS
    own = torch.Generator().manual_seed(place)
    shared = torch.Generator().manual_seed(10**6 + place // _ALIKE_IN_FAMILY)
    strength = 0.5 + float(torch.rand((), generator=own))
    tensors = {}
    for layer in layers:
        ups, downs = [], []
        for generator, size in ((shared, strength), (own, 0.7)):
            ups.append(torch.randn(layer.m, half, generator=generator) * fall * (0.02 * size))
            downs.append(torch.randn(half, layer.n, generator=generator) * 0.02)
        up, down = torch.cat(ups, 1).half(), torch.cat(downs).half()
        tensors[f"{layer.module}.lora_up.weight"] = up.reshape(layer.up_shape(2 * half))
        tensors[f"{layer.module}.lora_down.weight"] = down.reshape(layer.down_shape(2 * half))
        tensors[f"{layer.module}.alpha"] = torch.tensor(float(rank) / 2).half()
    return tensors


def _share(paths: Sequence[Path], folder: Path, part: float) -> bool:
    size = sum(path.stat().st_size for path in paths)
    recipe = Recipe(
        name="shared",
        models=tuple(paths),
        budget=int(part * size),
        output=folder / "models",
        exact="none",
        layer_weights="plain",
        overwrite=True,
    )
    phases = _Phases()
    with _timed() as took:
        result = run_share(preflight_share(recipe), Progress(phases.on_progress))
    phases.end()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(format_share(result))
    print(phases)
    print(
        f"{len(paths)} LoRAs of {size / 1e9:.2f} GB: {took.wall:.0f} s, {took.cpu:.0f} s of all cores,"
        f" {memory:.1f} GB at the peak, {result.report.bytes_loras / size:.1%} of the bytes"
    )
    return took.wall <= SECONDS


def _resize(path: Path, folder: Path, options: argparse.Namespace) -> bool:
    ours = folder / "ours.safetensors"
    request = CombineRequest((path,), rank=options.new_rank, to=ours, overwrite=True)
    with _timed() as took:
        result = run_combine(request, Progress())
    print(
        f"resized to rank {options.new_rank}: {took.wall:.1f} s, {took.cpu:.1f} s of all cores,"
        f" {result.kept:.4%} kept"
    )
    if options.kohya is None:
        return True
    theirs = folder / "theirs.safetensors"
    with _timed() as other:
        _run_kohya(options.kohya, path, theirs, options.new_rank)
    kept, difference = _compare(path, ours, theirs)
    print(
        f"kohya's script: {other.wall:.1f} s, {other.cpu:.1f} s of all cores, {kept:.4%} kept;"
        f" {other.wall / took.wall:.0f} times as long ({other.cpu / took.cpu:.0f} times by cores),"
        f" the results differ by {difference:.1e} of the squared norm"
    )
    return other.cpu >= FASTER * took.cpu and difference < ALIKE


def _run_kohya(script: Path, path: Path, to: Path, rank: int) -> None:
    command = [sys.executable, str(script), "--model", str(path), "--save_to", str(to)]
    command += ["--new_rank", str(rank), "--save_precision", "fp16"]
    command += ["--new_conv_rank", str(rank)]
    library = to.parent / "stand-ins" / "library"
    library.mkdir(parents=True, exist_ok=True)
    for name, text in _STAND_INS.items():
        (library / f"{name}.py").write_text(text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(library.parent)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def _compare(original: Path, ours: Path, theirs: Path) -> tuple[float, float]:
    """Returns the share that kohya's file keeps, and the squared norm of what both differ by."""
    files = [load_file(path) for path in (original, ours, theirs)]
    energy = lost = difference = 0.0
    for key in files[0]:
        if key.endswith(".lora_up.weight"):
            module = key.removesuffix(".lora_up.weight")
            pairs = [_factors(state, module) for state in files]
            energy += _squared([pairs[0]], [])
            lost += _squared([pairs[0]], [pairs[2]])
            difference += _squared([pairs[1]], [pairs[2]])
    return 1 - lost / energy, difference / energy


def _factors(state: dict[str, Tensor], module: str) -> tuple[Tensor, Tensor]:
    up = state[f"{module}.lora_up.weight"].double().flatten(1)
    down = state[f"{module}.lora_down.weight"].double().flatten(1)
    return up * float(state[f"{module}.alpha"]) / len(down), down


def _squared(plus: list[tuple[Tensor, Tensor]], minus: list[tuple[Tensor, Tensor]]) -> float:
    up = torch.cat([up for up, _ in plus] + [-up for up, _ in minus], 1)
    down = torch.cat([down for _, down in [*plus, *minus]])
    return float(((up.mT @ up) * (down @ down.mT)).sum())


class _Phases:
    """Seconds of each phase of a run, by its own words."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = ("", time.perf_counter())

    def on_progress(self, phase: str, _fraction: float) -> None:
        """Counts the time since the last report for its phase, of all sets of LoRAs together."""
        self.end()
        self._last = (phase.partition(" (")[0], self._last[1])

    def end(self) -> None:
        """Counts the time until now."""
        name, start = self._last
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - start
        self._last = (name, now)

    def __str__(self) -> str:
        rows = (f"{seconds:7.1f} s  {name or 'before'}" for name, seconds in self._seconds.items())
        return "\n".join(rows)


@contextmanager
def _timed() -> Iterator[Took]:
    took = Took()
    start, before = time.perf_counter(), _cpu()
    yield took
    took.wall, took.cpu = time.perf_counter() - start, _cpu() - before


def _cpu() -> float:
    """Returns the seconds of all cores, of this process and of those that it started."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="LoRAs as input at full size.")
    parser.add_argument(
        "--folder", type=Path, help="that keeps the LoRAs (default: a temporary one)"
    )
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.2, help="of the bytes")
    parser.add_argument("--attention", action="store_true", help="without convolutions")
    parser.add_argument("--every", type=int, default=1, help="take one module of so many")
    parser.add_argument("--kohya", type=Path, help="path of networks/resize_lora.py")
    parser.add_argument("--new-rank", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
