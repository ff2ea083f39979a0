"""`hyper-merge resize`: cuts a LoRA down."""

from __future__ import annotations

import argparse

from hyper_merge.cli.lora_tools import (
    add_output_arguments,
    add_size_arguments,
    run_combination,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the LoRA and the file's options."""
    parser.description = "Cuts a LoRA down to a rank, a size, or a share of its squared norm."
    parser.add_argument("loras", metavar="LORA", nargs=1, help="the file")
    add_size_arguments(parser, needed=True)
    parser.add_argument(
        "--dtype",
        default="same",
        help="of the factors: same, float16, bfloat16 or float32 (default: same as in the file)",
    )
    add_output_arguments(parser, "beside the LoRA")


run_command = run_combination
