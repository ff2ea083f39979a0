"""What the examples of all routes are made of: jobs that have begun, and that are done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """What the schema shows of a route.

    Attributes:
        answers: Answers of success by what they are about; empty where the answer is no JSON.
        body: Of the request; None where it has none.
    """

    answers: Mapping[str, Any] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None


def job_example(title: str, **changes: Any) -> dict[str, Any]:
    """Returns a job that has just been started, but for some changes."""
    return {
        "id": "3884416aaf4d",
        "title": title,
        "outcome": "running",
        "phase": "starting",
        "fraction": 0.0,
        "seconds": 0.0,
        "seconds_left": None,
        "stopping": False,
        "message": "",
        "warnings": [],
        "run": None,
        "result": None,
        **changes,
    }


def done_example(title: str, **changes: Any) -> dict[str, Any]:
    """Returns a job that is done, but for some changes."""
    phase = "putting the files in place"
    return job_example(title, outcome="done", phase=phase, fraction=1.0, seconds=61.4, **changes)


def start_example(title: str, body: Mapping[str, Any] | None = None) -> Example:
    """Returns the example of a route that starts a job."""
    return Example({"started": job_example(title)}, body)
