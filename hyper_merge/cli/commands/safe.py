"""`hyper-merge safe`: says which originals of a run could be deleted."""

from __future__ import annotations

import argparse

from hyper_merge.cli.arguments import add_output_folder
from hyper_merge.cli.output import say
from hyper_merge.cli.progress_bar import progress_bar
from hyper_merge.errors import settings_placed
from hyper_merge.recipe.loading import option_place
from hyper_merge.recipe.parsing import parse_share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the run and the threshold."""
    parser.description = (
        "Says of every original of a run how much of it is restored, against a threshold, and what"
        " deleting it would free. It never deletes anything."
    )
    parser.add_argument("run", metavar="RUN", help="its name")
    parser.add_argument(
        "--threshold",
        metavar="SHARE%",
        default="99%",
        help="of all differences from the hyper-model, the share that must be restored (default: 99%%)",
    )
    add_output_folder(parser)


def run_command(options: argparse.Namespace) -> None:
    """Prints the table; deletes nothing."""
    from hyper_merge.operations.deletable import find_deletable
    from hyper_merge.operations.deletable_text import format_deletion_report
    from hyper_merge.runs.folders import Folders

    with settings_placed(option_place, "threshold"):
        threshold = parse_share(options.threshold) or 1.0
    folders = Folders.under(options.output)
    with progress_bar() as progress:
        report = find_deletable(options.run, threshold, folders, progress)
    say(format_deletion_report(report))
