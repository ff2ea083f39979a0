"""`hyper-merge export`: makes one LoRA per checkpoint of a run."""

from __future__ import annotations

import argparse

from hyper_merge.cli.arguments import add_output_folder, option_values
from hyper_merge.cli.output import say
from hyper_merge.cli.progress_bar import progress_bar
from hyper_merge.errors import RecipeError
from hyper_merge.recipe.loading import option_place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the run, its checkpoints and the LoRAs' options."""
    parser.description = "Makes one LoRA that turns a run's hyper-model into a checkpoint."
    parser.add_argument("run", metavar="RUN", help="its name")
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="*", help="one or more")
    parser.add_argument("--all", action="store_true", help="every checkpoint of the run")
    parser.add_argument(
        "--rank",
        metavar="N",
        help="cut each layer down to this rank (default: the sum of the run's ranks, exact)",
    )
    add_output_folder(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")


def run_command(options: argparse.Namespace) -> None:
    """Writes the LoRAs and prints their figures."""
    from hyper_merge.operations.export import ExportRequest, run_export
    from hyper_merge.operations.export_text import format_export
    from hyper_merge.runs.folders import Folders

    if options.all == bool(options.checkpoints):
        raise RecipeError(
            "expected the names of checkpoints, or else --all",
            hint="hyper-merge runs lists the runs",
        )
    values = option_values(options, "run", "rank", "overwrite")
    values["checkpoints"] = None if options.all else options.checkpoints
    request = ExportRequest.parse(values, option_place)
    with progress_bar() as progress:
        exported = run_export(request, Folders.under(options.output), progress)
    say(format_export(exported, request.rank))
