"""`hyper-merge subtract`: takes LoRAs away from a checkpoint."""

from __future__ import annotations

import argparse
from functools import partial

from hyper_merge.cli.lora_tools import add_application_arguments, run_application


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the checkpoint, the LoRAs and the file's options."""
    parser.description = (
        "Takes LoRAs away from a checkpoint; every tensor keeps its type, and the VAE its bytes."
    )
    add_application_arguments(parser)


run_command = partial(run_application, subtract=True)
