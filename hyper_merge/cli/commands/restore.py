"""`hyper-merge restore`: writes a run's checkpoint, or a mixture, as a full file."""

from __future__ import annotations

import argparse
from pathlib import Path

from hyper_merge.cli.arguments import add_output_folder, option_values
from hyper_merge.cli.output import say
from hyper_merge.cli.progress_bar import progress_bar
from hyper_merge.errors import RecipeError
from hyper_merge.recipe.loading import option_place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the run, the checkpoint or the mixture, and the file's options."""
    parser.description = (
        "Writes hyper-model and LoRAs, added up, as a checkpoint: one of the run's, or a mixture."
    )
    parser.add_argument("run", metavar="RUN", help="its name")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="of the run, or fitted")
    parser.add_argument(
        "--mix",
        metavar="A:0.5,B:0.5",
        help="shares of the run's checkpoints instead; the hyper-model has what is missing to 1",
    )
    parser.add_argument(
        "--to",
        metavar="FILE",
        type=Path,
        help="FILE.safetensors (default: CHECKPOINT-restored among the checkpoints)",
    )
    parser.add_argument("--dtype", help="float16, bfloat16 or float32 (default: the run's)")
    add_output_folder(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")


def run_command(options: argparse.Namespace) -> None:
    """Writes the checkpoint and prints how near it is to the original."""
    from hyper_merge.operations.restore.request import RestoreRequest, parse_mix
    from hyper_merge.operations.restore.restore import run_restore
    from hyper_merge.operations.restore.text import format_restore
    from hyper_merge.runs.folders import Folders

    if bool(options.checkpoint) == bool(options.mix):
        raise RecipeError("expected the name of a checkpoint, or else --mix with several")
    values = option_values(options, "run", "to", "dtype", "overwrite")
    values["shares"] = parse_mix(options.mix) if options.mix else {options.checkpoint: 1.0}
    request = RestoreRequest.parse(values, option_place)
    with progress_bar() as progress:
        restored = run_restore(request, Folders.under(options.output), progress)
    say(format_restore(restored))
