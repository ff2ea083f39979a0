"""`hyper-merge fit`: finds multipliers for a checkpoint outside of a run."""

from __future__ import annotations

import argparse

from hyper_merge.cli.arguments import add_damaged_option, add_output_folder, option_values
from hyper_merge.cli.output import say
from hyper_merge.cli.progress_bar import progress_bar
from hyper_merge.recipe.loading import option_place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the run, the checkpoint and the fit's options."""
    parser.description = (
        "Finds the multipliers with which a run's LoRAs approximate a checkpoint that was not merged,"
        " or a LoRA where the run shares LoRAs."
    )
    parser.add_argument("run", metavar="RUN", help="its name")
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="the file; a LoRA where the run shares LoRAs"
    )
    parser.add_argument(
        "--topup",
        metavar="RANK|SHARE%",
        help="a private LoRA of what remains: a rank, or what is to be explained in all",
    )
    parser.add_argument("--name", help="by which the run knows it (default: the file's)")
    parser.add_argument("--style", action="store_true", help="print a line for styles.csv too")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--seed", metavar="N", default="0", help="of everything random")
    add_output_folder(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier fit")
    add_damaged_option(parser)


def run_command(options: argparse.Namespace) -> None:
    """Records the fit and prints its figures and tags."""
    from hyper_merge.operations.fit.fit import run_fit
    from hyper_merge.operations.fit.request import FitRequest
    from hyper_merge.operations.fit.text import format_fit, format_style
    from hyper_merge.operations.loras.fit import run_lora_fit
    from hyper_merge.operations.loras.fit_text import format_lora_fit
    from hyper_merge.runs.folders import Folders
    from hyper_merge.runs.lora_runs import is_lora_run, load_any_run

    folders = Folders.under(options.output)
    names = ("run", "checkpoint", "name", "topup", "device", "overwrite", "seed", "damaged")
    request = FitRequest.parse(option_values(options, *names), option_place)
    of_loras = is_lora_run(folders, request.run)
    with progress_bar() as progress:
        fitted = (run_lora_fit if of_loras else run_fit)(request, folders, progress)
    run = load_any_run(folders, request.run)
    say((format_lora_fit if of_loras else format_fit)(fitted, run))
    if options.style:
        say(format_style(fitted, run))
