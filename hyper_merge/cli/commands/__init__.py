"""The commands, one a file; a command is imported when it is called, and torch when it runs.

A command is a module with `add_arguments(parser)` and `run_command(options)`.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from typing import Final, Protocol, cast

COMMANDS: Final[Mapping[str, str]] = {
    "merge": "make the hyper-model, the LoRAs and the report",
    "average": "make the hyper-model alone",
    "plan": "forecast what LoRAs of which size would explain; writes nothing but the cache",
    "inspect": "say what files are, from their headers",
    "runs": "list or delete what was merged earlier",
    "extract": "make the LoRA that turns A into B",
    "export": "make one LoRA per checkpoint of a run",
    "fit": "find multipliers for a checkpoint outside of a run",
    "absorb": "merge a run's checkpoints and further ones",
    "loras": "turn many LoRAs of one base into a few shared ones",
    "resize": "cut a LoRA down to a rank, a size, or a share of what it does",
    "combine": "make one LoRA of several, with a multiplier each",
    "add": "add LoRAs to a checkpoint",
    "subtract": "take LoRAs away from a checkpoint",
    "restore": "write a run's checkpoint as a full file",
    "safe": "say which originals of a run could be deleted",
    "demo": "make a family of small checkpoints and merge it",
    "app": "open the tab as an app of its own",
}
"""Help of every command by its name, which is that of its module."""


class Command(Protocol):
    """A module of this package."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the command's arguments and description to its parser; imports nothing heavy."""

    def run_command(self, options: argparse.Namespace) -> None:
        """Does what the command is for.

        Raises:
            HyperMergeError: it is refused.
        """


def load_command(name: str) -> Command:
    """Imports a command of `COMMANDS`."""
    return cast("Command", importlib.import_module(f"{__name__}.{name}"))
