"""`hyper-merge merge`: makes the hyper-model, the LoRAs and the report."""

from __future__ import annotations

import argparse

from hyper_merge.cli.cluster_options import add_cluster_options, cluster_request, workers_of
from hyper_merge.cli.output import say
from hyper_merge.cli.progress_bar import progress_bar, say_above
from hyper_merge.cli.recipe_options import add_recipe_arguments, preflight


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the recipe and its settings."""
    parser.description = "Make the hyper-model, the LoRAs and the report."
    add_recipe_arguments(parser)
    add_cluster_options(parser)


def run_command(options: argparse.Namespace) -> None:
    """Merges, after saying what that will take."""
    from hyper_merge.cli.merge_text import format_merge
    from hyper_merge.operations.merge.estimate import estimate_merge
    from hyper_merge.operations.merge.merge import run_merge
    from hyper_merge.operations.merge.training_rounds import with_training
    from hyper_merge.runtime.formatting import format_duration, format_size

    request = cluster_request(options)
    with progress_bar() as progress:
        validated = preflight(options, progress)
        estimate = estimate_merge(validated)
        say_above(
            f"{len(validated.inputs.headers)} checkpoints; {format_duration(estimate.seconds)}"
            f"{with_training(validated.rounds)}, {format_size(estimate.memory)} of memory and at most"
            f" {format_size(estimate.disk)} of disk"
        )
        with workers_of(request, progress) as workers:
            merged = run_merge(validated, progress, workers=workers)
    say(format_merge(merged))
