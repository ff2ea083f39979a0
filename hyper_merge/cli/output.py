"""What all commands share: how they say something, and what each of them has."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TextIO

from hyper_merge.operations.merge.merge import MergeResult
from hyper_merge.runs.report_text import format_report


def say(message: str, stream: TextIO | None = None) -> None:
    """A message with the end of its line, on standard output unless another stream is given."""
    stream = stream or sys.stdout
    stream.write(message if message.endswith("\n") else message + "\n")
    stream.flush()


def finish(parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], None]) -> None:
    """Adds what every command has, and what runs it."""
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    parser.set_defaults(command=command)


def format_outcome(merged: MergeResult) -> str:
    """A merge as plain text: its figures, where everything is, and how to use it."""
    report, place = merged.report, merged.place
    reused = " (it was there already)" if place.exists else ""
    lines = [format_report(report), f"hyper-model: {place.hyper_model}{reused}"]
    lines += [f"LoRA:        {path}" for path in merged.loras]
    lines += [f"multipliers, manifest and report: {place.folder}", ""]
    row = report.checkpoints[0]
    lines += [
        f"To get {row.name}, load the hyper-model and put this into the prompt:",
        report.tags(row),
    ]
    return "\n".join(lines)
