"""`hyper-merge plan`: forecasts what LoRAs of which size would explain."""

from __future__ import annotations

import argparse

from hyper_merge.cli.output import say
from hyper_merge.cli.progress_bar import progress_bar
from hyper_merge.cli.recipe_options import add_recipe_arguments, preflight


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the recipe and its settings."""
    parser.description = (
        "Forecasts what LoRAs of which size would explain; writes nothing but the cache."
    )
    add_recipe_arguments(parser)


def run_command(options: argparse.Namespace) -> None:
    """Prints the plan."""
    from hyper_merge.cli.plan_text import format_plan
    from hyper_merge.operations.merge.plan import make_plan

    with progress_bar() as progress:
        # Nothing is written under a name, so that none is needed.
        plan = make_plan(preflight(options, progress, {"name": "plan"}), progress)
    say(format_plan(plan))
