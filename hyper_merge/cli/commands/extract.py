"""`hyper-merge extract`: makes the LoRA that turns one checkpoint into another."""

from __future__ import annotations

import argparse

from hyper_merge.cli.arguments import (
    add_create_option,
    add_damaged_option,
    option_values,
    require_folder,
)
from hyper_merge.cli.output import say
from hyper_merge.cli.progress_bar import progress_bar
from hyper_merge.recipe.loading import option_place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the checkpoints and the LoRA's options."""
    parser.description = "Makes the LoRA that turns checkpoint A into checkpoint B."
    parser.add_argument("base", metavar="A", help="the checkpoint that the LoRA is added to")
    parser.add_argument("checkpoint", metavar="B", help="the checkpoint that comes of it")
    parser.add_argument("--rank", metavar="N", default="64", help="of the LoRA (default: 64)")
    parser.add_argument("--name", help="of the LoRA (default: B-from-A)")
    parser.add_argument(
        "--output", default="models", help="models folder, or FILE.safetensors (default: models)"
    )
    parser.add_argument(
        "--dtype",
        default="float16",
        help="stored in the file: float16, bfloat16 or float32 (default: float16)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--seed", metavar="N", default="0", help="of everything random")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    add_damaged_option(parser)
    add_create_option(parser)


def run_command(options: argparse.Namespace) -> None:
    """Writes the LoRA and prints its figures."""
    from hyper_merge.operations.extract.extract import (
        ExtractRequest,
        run_extract,
    )
    from hyper_merge.operations.extract.text import format_extraction

    names = ("base", "checkpoint", "rank", "name", "output", "dtype", "device", "seed", "damaged")
    request = ExtractRequest.parse(option_values(options, *names, "overwrite"), option_place)
    if not (request.is_file or options.create):
        require_folder(request.output)
    with progress_bar() as progress:
        extracted = run_extract(request, None, progress)
    say(format_extraction(extracted))
