"""`hyper-merge absorb`: merges a run's checkpoints and further ones."""

from __future__ import annotations

import argparse
from pathlib import Path

from hyper_merge.cli.arguments import add_output_folder, option_values
from hyper_merge.cli.output import say
from hyper_merge.cli.progress_bar import progress_bar
from hyper_merge.recipe.loading import option_place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the run, the new checkpoints and the new run's options."""
    parser.description = (
        "Makes a new run of a run's checkpoints and further ones, which are all read; with --from_cache"
        " the run's analysis in the cache and its average are extended by the new ones, and of the old"
        " ones little is read. The run's multipliers, with those of the new checkpoints' fits, are one of"
        " the starts. The old run stays as it is."
    )
    parser.add_argument("run", metavar="RUN", help="its name")
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", type=Path, help="the files")
    parser.add_argument("--name", help="of the new run (default: the old one's with +1, +2, ...)")
    parser.add_argument(
        "--from_cache",
        action="store_true",
        help="read little of the old checkpoints where the cache will do: the average is then exact within"
        " a rounding step, and the loss within about a percent",
    )
    add_output_folder(parser)


def run_command(options: argparse.Namespace) -> None:
    """Makes the new run and prints its report."""
    from hyper_merge.cli.merge_text import format_merge
    from hyper_merge.operations.extend import ExtendRequest, run_extend
    from hyper_merge.runs.folders import Folders

    values = option_values(options, "run", "checkpoints", "name", "from_cache")
    request = ExtendRequest.parse(values, option_place)
    with progress_bar() as progress:
        merged = run_extend(request, Folders.under(options.output), progress)
    say(format_merge(merged))
