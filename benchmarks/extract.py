"""LoRA extraction from two full-size checkpoints, against a full SVD of every layer.

    python benchmarks/extract.py [--folder FOLDER] [--rank 64] [--each 2] [--all] [--narrow]

Makes two full-size checkpoints of SD 1.x where they are not there yet. Then both ways take the same
layers, turn by turn so that both see the same machine: a few of every shape, scaled by how many there
are, or all with `--all` (a quarter of an hour and more). Prints the ratio of the times and of the
squared errors, and fails below ten times as fast or above 1.001 times the error. At the end runs the
whole command.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from full_size import make_family
from measure import measure
from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.reader import CheckpointReader, read_header
from hyper_merge.decomposition.linalg import energy_of
from hyper_merge.decomposition.truncated_svd import TruncatedSvd, truncated_svd
from hyper_merge.operations.merge.preflight import common_layout
from hyper_merge.runtime.parallel import parallel_map
from hyper_merge.synthetic.writer import NARROW, FamilySpec

FASTER, WORSE = 10.0, 1.001


@dataclass
class Sum:
    """Over layers: what each way took, and both squared errors.

    Seconds are of all cores together, which other work on the machine hardly changes; `wall` is by the
    clock.
    """

    full: float = 0.0  # as the layer lies
    upright: float = 0.0  # longer side down, which LAPACK likes better
    ours: float = 0.0
    wall_full: float = 0.0
    wall_ours: float = 0.0
    least: float = 0.0
    error: float = 0.0

    def add(self, other: Sum, times: float) -> None:
        """Counts another sum so many times."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + times * value)

    def __str__(self) -> str:
        return (
            f"CPU s: full SVD {self.full:7.2f}, upright {self.upright:7.2f}, ours {self.ours:6.2f};"
            f" ratio {self.full / self.ours:5.1f}, {self.upright / self.ours:5.1f},"
            f" by the clock {self.wall_full / self.wall_ours:5.1f}; error {self.error / self.least:.6f}"
        )


def main() -> int:
    """Runs both ways and prints the table."""
    options = _options()
    spec = replace(NARROW if options.narrow else FamilySpec(), count=2)
    paths = make_family(options.folder, spec, "narrow" if options.narrow else "synthetic")
    layers = common_layout([read_header(path) for path in paths]).without_ends().layers
    shapes: dict[tuple[int, ...], list[Layer]] = {}
    for layer in layers:
        shapes.setdefault((layer.m, layer.n), []).append(layer)
    total, worst = Sum(), 0.0
    for shape, alike in sorted(shapes.items(), key=lambda item: item[0][0] * item[0][1]):
        some = (
            alike if options.all else alike[:: max(len(alike) // options.each, 1)][: options.each]
        )
        shape_sum = Sum()
        for start in range(0, len(some), options.each):
            deltas = [_delta(paths, layer) for layer in some[start : start + options.each]]
            shape_sum.add(_compare_ways(deltas, options.rank), 1.0)
        worst = max(worst, shape_sum.error / shape_sum.least)
        print(
            f"{shape[0]:6} x {shape[1]:6}: {len(some):3} of {len(alike):3}  {shape_sum}", flush=True
        )
        total.add(shape_sum, len(alike) / len(some))
    print(f"all {len(layers)} layers, rank {options.rank}:  {total}, worst shape {worst:.6f}")
    _whole(paths, options.rank)
    return int(total.full < FASTER * total.ours or worst > WORSE)


def _compare_ways(deltas: Sequence[Tensor], rank: int) -> Sum:
    """Times all ways; each has as many layers at once as the machine has cores."""
    ours = _timed(lambda delta: _ours(delta, rank), deltas)
    upright = _timed(
        lambda delta: _values(delta.mT if len(delta) < delta.shape[1] else delta), deltas
    )
    full = _timed(_values, deltas)
    return Sum(
        full.cpu,
        upright.cpu,
        ours.cpu,
        full.wall,
        ours.wall,
        sum(float(values[rank:].double().square().sum()) for values in full.results),
        sum(_error(*pair) for pair in zip(deltas, ours.results, strict=True)),
    )


@dataclass
class Timed:
    """Results of one way, and the seconds that it took."""

    results: list[Any]
    cpu: float
    wall: float


def _timed(way: Callable[[Tensor], Any], deltas: Sequence[Tensor]) -> Timed:
    with parallel_map(torch.device("cpu"), lambda: None) as parallel:
        start, began = time.perf_counter(), time.process_time()
        results = list(parallel(way, deltas))
        return Timed(results, time.process_time() - began, time.perf_counter() - start)


def _ours(delta: Tensor, rank: int) -> TruncatedSvd:
    return truncated_svd(delta, rank, torch.Generator().manual_seed(0))


def _values(delta: Tensor) -> Tensor:
    """Returns singular values of the full SVD, which computes vectors, too."""
    return torch.linalg.svd(delta, full_matrices=False)[1]


def _error(delta: Tensor, truncated: TruncatedSvd) -> float:
    return energy_of(delta - truncated.up @ truncated.down)


def _delta(paths: Sequence[Path], layer: Layer) -> Tensor:  # (m, n)
    rows = slice(*layer.rows) if layer.rows else slice(None)
    weights = []
    for path in paths:
        with CheckpointReader(path) as file:
            weights.append(file.tensor(layer.key)[rows].float())
    return (weights[1] - weights[0]).reshape(layer.m, layer.n)


def _whole(paths: Sequence[Path], rank: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "extracted.safetensors")
        command = [sys.executable, "-m", "hyper_merge", "extract", *map(str, paths)]
        command += ["--rank", str(rank), "--output", str(output)]
        log = Path(folder, "log")
        run = measure(command, log)
        print(log.read_text())
    print(
        f"the whole command: {run.seconds:.1f} s, {run.cpu_seconds:.1f} CPU s,"
        f" {run.anonymous / 1e9:.2f} GB anonymous"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data"))
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--each", type=int, default=2, help="layers of every shape")
    parser.add_argument("--all", action="store_true", help="every layer")
    parser.add_argument("--narrow", action="store_true", help="small checkpoints, to try it")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
