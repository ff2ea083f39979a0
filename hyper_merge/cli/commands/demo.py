"""`hyper-merge demo`: makes a family of small checkpoints and merges it."""

from __future__ import annotations

import argparse
from pathlib import Path

from hyper_merge.cli.output import say
from hyper_merge.cli.progress_bar import progress_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the folder."""
    parser.add_argument("folder", nargs="?", type=Path, default=Path("hyper-merge-demo"))


def run_command(options: argparse.Namespace) -> None:
    """Makes the family, merges it, and prints the report."""
    from hyper_merge.cli.merge_text import format_merge
    from hyper_merge.operations.demo import run_demo

    with progress_bar() as progress:
        merged = run_demo(options.folder, progress)
    say(format_merge(merged))
