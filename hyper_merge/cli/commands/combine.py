"""`hyper-merge combine`: makes one LoRA of several."""

from __future__ import annotations

import argparse

from hyper_merge.cli.lora_tools import (
    add_multipliers_argument,
    add_output_arguments,
    add_size_arguments,
    run_combination,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the LoRAs and the file's options."""
    parser.description = "Makes one LoRA of several, with a multiplier each: exact by default, or cut to fewer ranks."
    parser.add_argument("loras", metavar="LORA", nargs="+", help="two files or more")
    add_multipliers_argument(parser)
    add_size_arguments(parser, needed=False)
    parser.add_argument(
        "--dtype",
        default="same",
        help="of the factors: same, float16, bfloat16 or float32 (default: same as in the files)",
    )
    add_output_arguments(parser, "beside the first, named after all")


run_command = run_combination
