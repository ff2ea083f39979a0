"""Injects faults of the file system into merges, fits, restores and deletions, and tells what is lost.

    python benchmarks/faults.py              # every use of the file system: minutes to an hour
    python benchmarks/faults.py --sample 20  # a few of each work

Every use (open, write, fsync, rename, link, unlink, mkdir, utime, read of a mapped file) fails once, and
once it ends the process. After each fault every earlier file must be as it was, or the whole
new set be there; the next run must succeed and leave nothing over.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fault_scenarios import SCENARIOS, Scenario, write_sources  # noqa: E402
from fault_trials import Trial, make_repeatable  # noqa: E402


def main() -> int:
    """Prints the number of faults and every loss; returns 1 if there is one."""
    options = _options()
    torch.set_num_threads(1)  # a process with threads cannot be forked
    make_repeatable()
    gc.freeze()  # a collection in a forked process would copy all of its memory
    gc.disable()
    injected, lost = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        write_sources(Path(folder) / "sources")
        for scenario in SCENARIOS:
            if options.only in (None, scenario.name):
                numbers = _try(scenario, Path(folder), options.sample)
                injected, lost = injected + numbers[0], lost + numbers[1]
    print(f"{injected:,} faults injected, {lost} with a loss")
    return 1 if lost else 0


def _try(scenario: Scenario, folder: Path, sample: int) -> tuple[int, int]:
    """Tries a scenario; returns the numbers of faults and of losses."""
    trial = Trial(scenario, folder / "sources", folder / scenario.name)
    lost = 0
    for fault in trial.faults(sample, SCENARIOS.index(scenario)):
        try:
            if not trial.is_reached(fault):
                break
        except AssertionError as error:
            lost += 1
            print(f"LOSS: {error}", flush=True)
    uses = Counter(trial.uses)
    print(
        f"{scenario.name}: {trial.injected.total()} faults"
        f" ({', '.join(f'{count} {kind}' for kind, count in trial.injected.items())})"
        f" in {uses.total()} uses ({', '.join(f'{count} {use}' for use, count in uses.items())})",
        flush=True,
    )
    return trial.injected.total(), lost


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=0, help="faults of each work; 0 for all")
    parser.add_argument("--only", help="the name of one work")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
