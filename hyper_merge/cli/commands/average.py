"""`hyper-merge average`: makes the hyper-model alone."""

from __future__ import annotations

import argparse

from hyper_merge.cli.output import say
from hyper_merge.cli.progress_bar import progress_bar
from hyper_merge.cli.recipe_options import AVERAGE_SETTINGS, add_recipe_arguments, preflight


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the recipe and its settings."""
    parser.description = "Make the hyper-model alone."
    add_recipe_arguments(parser, AVERAGE_SETTINGS)


def run_command(options: argparse.Namespace) -> None:
    """Writes the average."""
    from hyper_merge.operations.merge.average import run_average

    with progress_bar() as progress:
        path = run_average(preflight(options, progress), progress)
    say(f"hyper-model: {path}")
