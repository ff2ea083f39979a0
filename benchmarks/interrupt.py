"""How long a full-size merge goes on after the request to stop it, by phase.

    python benchmarks/interrupt.py [--folder FOLDER] [--count 4] [--trials 3] [--seed 0] [--narrow]

Makes the family of `full_size.py` where it is not there yet and merges it once. Then it stops merges
over that one at random moments of every phase, prints the worst time until the exception, and
fails if one of them took longer than two seconds or left anything behind. Ten to twenty minutes; with
`--narrow`, which takes small layers and ranks, a few.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from full_size import make_family

from hyper_merge.errors import InterruptedRun
from hyper_merge.operations.demo import DEMO_RANKS
from hyper_merge.operations.merge.merge import run_merge
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.progress import Progress
from hyper_merge.synthetic.writer import NARROW, FamilySpec

LIMIT = 2.0  # seconds


@dataclass
class Watch:
    """Notes the phases of a run, and may request a stop at a moment of one of them."""

    phase: str | None = None
    delay: float = 0.0  # seconds from the beginning of that phase
    requested: float | None = None  # when, by the clock
    seen: dict[str, list[float]] = field(default_factory=dict)  # phase -> times of its reports

    def on_progress(self, phase: str, _fraction: float) -> None:
        """Notes the time."""
        now = time.perf_counter()
        self.seen.setdefault(phase, []).append(now)
        if self.requested is None and phase == self.phase:
            self.requested = now + self.delay

    def should_stop(self) -> bool:
        """Whether the moment has come."""
        return self.requested is not None and time.perf_counter() >= self.requested

    @property
    def missed(self) -> bool:
        """Whether the request came in another phase."""
        last = list(self.seen)[-1]
        return last != self.phase and self.seen[last][0] < (self.requested or 0.0)

    @property
    def progress(self) -> Progress:
        """The progress for the run."""
        return Progress(self.on_progress, self.should_stop)


def main() -> int:
    """Runs all trials and prints the table."""
    options = _options()
    generator = random.Random(options.seed)
    out = options.folder / "out-interrupt"
    shutil.rmtree(out, ignore_errors=True)
    spec = replace(NARROW if options.narrow else FamilySpec(), count=options.count)
    recipe = Recipe(
        name="bench",
        models=tuple(make_family(options.folder, spec)),
        ranks=DEMO_RANKS if options.narrow else (),
        output=out,
        overwrite=True,
    )
    complete = Watch()
    start = time.perf_counter()
    run_merge(run_preflight(recipe), complete.progress)
    begins = [start, *(times[-1] for times in complete.seen.values())]
    worst = 0.0
    phases = list(complete.seen.items())[:-1]  # the last one is reported when all is done
    for (phase, reports), begin in zip(phases, begins, strict=False):
        lasts = reports[-1] - begin
        gap = max(after - before for before, after in zip([begin, *reports], reports, strict=False))
        late = [
            _trial(recipe, Watch(phase, generator.random() * lasts)) for _ in range(options.trials)
        ]
        worst = max(worst, *late, 0.0)
        print(
            f"{phase:26} {lasts:6.1f} s, reported every {gap:4.2f} s at least; stopped within"
            f" {', '.join(f'{x:.2f}' for x in sorted(late))} s",
            flush=True,
        )
    return int(worst > LIMIT)


def _trial(recipe: Recipe, watch: Watch) -> float:
    """Returns the seconds from the request to the end of a run."""
    if watch.phase in {"hashing the checkpoints", "reading and analysing"}:
        weights = (2 + watch.delay, *[1.0] * (len(recipe.models) - 1))
        recipe = replace(recipe, weights=weights)  # which neither analysis nor hyper-model serves
        (recipe.output / "hyper-merge" / "cache" / "hashes.json").unlink(missing_ok=True)
    before = _snapshot(recipe.output)
    preflight = run_preflight(recipe)
    try:
        run_merge(preflight, watch.progress)
    except InterruptedRun:
        late = time.perf_counter() - (watch.requested or 0.0)
    else:
        late = None
    if late is None or watch.missed:  # faster than the first run, which may have had company
        return _trial(recipe, Watch(watch.phase, watch.delay / 2))
    if _snapshot(recipe.output) != before:
        raise RuntimeError(f"stopped in {watch.phase}, a run left something behind")
    return late


def _snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    """Returns size and time of change of every file; only the size in the cache, and no hashes."""
    return {
        path: (path.stat().st_size, 0 if path.parent.name == "cache" else path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "hashes.json"
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data"))
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--narrow", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
