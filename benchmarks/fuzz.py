"""Has hostile files read in place of every file that is read, and tells what was no refusal.

    python benchmarks/fuzz.py                     # thousands of inputs of each kind: about half an hour
    python benchmarks/fuzz.py --inputs 100        # a few
    python benchmarks/fuzz.py --only manifest --first 5000

Every kind is tried in a process of its own. An input fails that ends in anything but a return or
a `HyperMergeError`, that takes more than ten seconds of the processor or two minutes, or 200 MB more
memory than all before it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fuzzing.targets import TARGETS, Target  # noqa: E402
from fuzzing.workshop import Workshop  # noqa: E402

SECONDS = 10.0  # of the processor, for the machine may be busy
PATIENCE = 120.0  # seconds in which something must come back
MEMORY = 200 * 10**6  # bytes


@dataclass
class Tally:
    """What became of the inputs of a target."""

    tried: int = 0
    taken: int = 0
    failed: int = 0
    slowest: float = 0.0  # seconds


def main() -> int:
    """Prints the number of inputs and every failure; returns 1 if there is one."""
    options = _options()
    torch.set_num_threads(1)  # a process with threads cannot be forked
    warnings.simplefilter("error")
    tried, failed = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder) / "models")
        for target in TARGETS:
            if options.only in (None, target.name):
                numbers = range(
                    options.first, options.first + max(1, options.inputs // target.cost)
                )
                tally = _try_all(target, workshop, numbers)
                tried, failed = tried + tally.tried, failed + tally.failed
                print(
                    f"{target.name}: {tally.tried:,} inputs, {tally.taken:,} read, {tally.failed}"
                    f" failed, {tally.slowest:.2f} s at most",
                    flush=True,
                )
    print(f"{tried:,} inputs tried, {failed} failed")
    return 1 if failed else 0


def _try_all(target: Target, workshop: Workshop, numbers: range) -> Tally:
    """Tries inputs in forked processes; a new one goes on after one that was ended."""
    tally = Tally()
    context = multiprocessing.get_context("fork")
    while tally.tried < len(numbers):
        receiver, sender = context.Pipe(duplex=False)
        rest = numbers[tally.tried :]
        process = context.Process(target=_work, args=(target, workshop, rest, sender))
        process.start()
        sender.close()
        _watch(target, rest, receiver, tally)
        process.kill()
        process.join()
    return tally


def _watch(target: Target, numbers: range, receiver: Connection, tally: Tally) -> None:
    """Counts what a process tells, up to its end or to an input that takes too long."""
    for number in numbers:
        began = time.monotonic()
        try:
            outcome = receiver.recv() if receiver.poll(PATIENCE) else f"took over {PATIENCE} s"
        except EOFError:
            outcome = "ended the process"
        tally.tried += 1
        tally.slowest = max(tally.slowest, time.monotonic() - began)
        tally.taken += outcome == "read"
        if outcome not in ("read", "refused"):
            tally.failed += 1
            print(f"FAILED: {target.name}, input {number}: {outcome}", flush=True)
        if outcome.startswith((f"took over {PATIENCE}", "ended")):
            return


def _work(target: Target, workshop: Workshop, numbers: range, sender: Connection) -> None:
    for number in numbers:
        data = target.damaged(workshop, number)
        before, began = _peak(), time.process_time()
        try:
            outcome = "read" if target.is_taken(workshop, data) else "refused"
        except Exception:
            outcome = traceback.format_exc()
        if time.process_time() - began > SECONDS:
            outcome = f"took over {SECONDS} s"
        elif number != numbers[0] and _peak() - before > MEMORY:
            outcome = f"took {(_peak() - before) / 1e6:.0f} MB"
        sender.send(outcome)


def _peak() -> int:
    """Returns the most memory in bytes that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=5000, help="of the cheapest kinds")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--only", help="the name of one kind")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
