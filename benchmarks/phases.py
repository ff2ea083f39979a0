"""Where the time and the memory of a merge go: every phase, beside what was foretold.

    python benchmarks/phases.py [--folder FOLDER] [--family sd1] [--count 4] [SETTING=VALUE ...]

Makes a full-size family as `full_size.py` does, merges it in this process at the default settings, once
from nothing and once with other ranks from the cache, and prints for every phase seconds, processor
seconds and the peak of anonymous memory, in all beside what was foretold.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from full_size import OTHER_RANKS, SPECS, warm_family
from measure import anonymous_bytes
from tables import table

from hyper_merge.operations.merge.estimate import estimate_merge
from hyper_merge.operations.merge.merge import run_merge
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.progress import Progress

_MERGE = "hyper_merge.operations.merge.merge"
_SOLVING = "hyper_merge.operations.merge.solving"
_SOLVE = "hyper_merge.solver.solve"
PHASES = {  # function -> its phase, without those of the functions that it calls
    f"{_MERGE}.make_lineage": "hashing",
    f"{_MERGE}.sampled_options": "reading",
    f"{_MERGE}.stream_layers": "reading",
    f"{_MERGE}._sensitivities": "running",
    f"{_MERGE}.choose_layers": "metric",
    f"{_SOLVE}._Solver._overcomplete_ranks": "metric",
    f"{_SOLVE}._Solver._problems": "metric",
    f"{_SOLVE}.best_start": "starts",
    f"{_SOLVE}.initial_factors": "starts",
    f"{_SOLVE}._Solver._overcomplete": "first sweeps",
    f"{_SOLVE}.prune_ranks": "pruning",
    f"{_SOLVE}.refine": "last sweeps",
    f"{_SOLVE}.try_sweeps": "trial sweeps",
    f"{_SOLVE}._Solver._private_groups": "private start",
    f"{_SOLVING}.quantize": "rounding",
    f"{_SOLVING}.evaluate": "rounding",
    f"{_MERGE}._write": "writing",
}


@dataclass
class Spent:
    """What one phase took, without the phases within it."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak: int = 0  # bytes of anonymous memory


class Ledger:
    """Counts what every phase of a run takes."""

    def __init__(self) -> None:
        self.phases: dict[str, Spent] = {"rest": Spent()}
        self._open = ["rest"]
        self._since = (time.perf_counter(), time.process_time())
        self._ends = threading.Event()

    @contextmanager
    def counting(self) -> Iterator[Ledger]:
        """Counts while the block runs."""
        watch = threading.Thread(target=self._watch, daemon=True)
        watch.start()
        self._settle()
        try:
            yield self
        finally:
            self._settle()
            self._ends.set()
            watch.join()

    def phase(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function, which counts for a phase as long as it runs."""

        @functools.wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            self._settle()
            self.phases.setdefault(name, Spent())
            self._open.append(name)
            try:
                return function(*arguments, **options)
            finally:
                self._settle()
                self._open.pop()

        return counted

    def _settle(self) -> None:
        """Counts what was spent since the last time for the innermost phase."""
        now = (time.perf_counter(), time.process_time())
        spent = self.phases[self._open[-1]]
        spent.seconds += now[0] - self._since[0]
        spent.cpu_seconds += now[1] - self._since[1]
        self._since = now

    def _watch(self) -> None:
        while not self._ends.wait(0.05):
            spent = self.phases[self._open[-1]]
            spent.peak = max(spent.peak, anonymous_bytes())


def main() -> None:
    """Runs both merges and prints their tables."""
    options = _options()
    paths = warm_family(options.folder, options.family, options.count)
    out = options.folder / f"phases-{options.family}-{options.count}"
    shutil.rmtree(out, ignore_errors=True)
    settings = {"models": list(map(str, paths)), "output": str(out)}
    settings |= dict(setting.split("=", 1) for setting in options.settings)
    _merge("from nothing", {**settings, "name": "first"})
    _merge("other ranks", {**settings, "name": "second", "ranks": " ".join(OTHER_RANKS)})


def _merge(title: str, settings: dict[str, object]) -> None:
    preflight = run_preflight(Recipe.parse(settings, lambda key: key))
    foretold = estimate_merge(preflight)
    ledger = Ledger()
    with ledger.counting():
        _count_phases(ledger)
        result = run_merge(preflight, Progress(warn=print))
    rows = [
        (name, f"{spent.seconds:.1f}", f"{spent.cpu_seconds:.1f}", f"{spent.peak / 1e9:.2f}")
        for name, spent in ledger.phases.items()
    ]
    seconds = sum(spent.seconds for spent in ledger.phases.values())
    cpu_seconds = sum(spent.cpu_seconds for spent in ledger.phases.values())
    peak = max(spent.peak for spent in ledger.phases.values())
    rows.append(("all", f"{seconds:.1f}", f"{cpu_seconds:.1f}", f"{peak / 1e9:.2f}"))
    rows.append(("foretold", f"{foretold.seconds:.1f}", "", f"{foretold.memory / 1e9:.2f}"))
    print(
        f"\n{title}: weighted loss {result.report.weighted_loss:.4f},"
        f" private LoRAs {result.report.weighted_private_loss:.4f}"
    )
    print(table(("phase", "s", "CPU s", "GB"), rows), flush=True)


def _count_phases(ledger: Ledger) -> None:
    """Lets every function of `PHASES` count; those of an earlier ledger count for this one."""
    for place, name in PHASES.items():
        module, _, last = place.rpartition(".")
        owner: Any = importlib.import_module(module.removesuffix("._Solver"))
        owner = owner._Solver if module.endswith("._Solver") else owner
        function = getattr(owner, last)
        function = getattr(function, "__wrapped__", function)  # of an earlier merge's ledger
        setattr(owner, last, ledger.phase(name, function))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE", help="of the merge")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data"))
    parser.add_argument("--family", choices=sorted(SPECS), default="sd1")
    parser.add_argument("--count", type=int, default=4)
    return parser.parse_args()


if __name__ == "__main__":
    main()
