"""What all commands share: how they say something, and what each of them has."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TextIO


def say(message: str, stream: TextIO | None = None) -> None:
    """A message with the end of its line, on standard output unless another stream is given."""
    stream = stream or sys.stdout
    stream.write(message if message.endswith("\n") else message + "\n")
    stream.flush()


def finish(parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], None]) -> None:
    """Adds what every command has, and what runs it."""
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    parser.set_defaults(command=command)
