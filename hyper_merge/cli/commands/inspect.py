"""`hyper-merge inspect`: says what files are, from their headers."""

from __future__ import annotations

import argparse
from pathlib import Path

from hyper_merge.cli.output import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the files."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")


def run_command(options: argparse.Namespace) -> None:
    """Prints a table of the files."""
    from hyper_merge.operations.inspect_text import format_inspection

    say(format_inspection(options.files))
