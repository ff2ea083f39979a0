"""Has schemathesis send requests to the HTTP API, and tells what was not as the API's schema says.

    python benchmarks/fuzz_api.py                 # tens of thousands of requests: about half an hour
    python benchmarks/fuzz_api.py --examples 50   # fewer drawn ones
    python benchmarks/fuzz_api.py --seed 7        # others

They are the schema's examples, the edges of every field, values drawn at random, and sequences of
requests that use one another's answers. A failure is an answer with status 500 or one that the schema
lacks, one of another form, a request that is taken against the schema, a job that fails or goes on for
over a minute when it is asked to stop, and 500 MB more memory than before the first request.
"""

from __future__ import annotations

import argparse
import logging
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fuzzing.api_schema import ApiTrial  # noqa: E402

JOB_SECONDS = 0.5  # after which a job is stopped, where most of them are done
MEMORY = 500 * 10**6  # bytes
PHASES = ("examples", "coverage", "fuzzing", "stateful")


def main() -> int:
    """Prints the number of requests of each phase and every failure; returns 1 if there is one."""
    options = _options()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trial = ApiTrial(Path(folder) / "models", JOB_SECONDS)
        before = _peak()
        for phase in PHASES:
            began, sent = time.monotonic(), trial.requests
            trial.run({phase}, options.examples, options.seed)
            seconds = time.monotonic() - began
            print(f"{phase}: {trial.requests - sent:,} requests in {seconds:.0f} s", flush=True)
        if _peak() - before > MEMORY:
            trial.failures.append(f"took {(_peak() - before) / 1e6:.0f} MB of memory")
    for failure in dict.fromkeys(trial.failures):
        print(f"FAILED: {failure}")
    statuses = ", ".join(f"{count:,} x {status}" for status, count in sorted(trial.answers.items()))
    jobs = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(trial.jobs.items()))
    print(f"answers: {statuses}; jobs: {jobs}; slowest answer {trial.slowest:.1f} s")
    print(f"{trial.requests:,} inputs tried, {len(trial.failures)} failed")
    return 1 if trial.failures else 0


def _peak() -> int:
    """Returns the most memory in bytes that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=500, help="drawn for each route")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
