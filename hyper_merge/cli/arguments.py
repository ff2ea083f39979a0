"""Arguments that several commands share, and the values that they give."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Final

from hyper_merge.recipe.plain_values import plain_value

OUTPUT_HELP: Final = "the models folder (default: models)"

_NUMBERS: Final = ("rank", "seed")  # the others are text, whatever they look like


def add_output_folder(parser: argparse.ArgumentParser) -> None:
    """Adds the option for the models folder."""
    parser.add_argument(
        "--output", type=Path, default=Path("models"), metavar="FOLDER", help=OUTPUT_HELP
    )


def finish_parser(
    parser: argparse.ArgumentParser, run_command: Callable[[argparse.Namespace], None]
) -> None:
    """Adds what every command has, and the function that runs it."""
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    parser.set_defaults(run_command=run_command)


def option_values(options: argparse.Namespace, *names: str) -> dict[str, object]:
    """Returns the plain values of options by name, as the `parse` of a request takes them."""
    values = {name: getattr(options, name) for name in names}
    return {
        name: plain_value(value) if name in _NUMBERS and value is not None else value
        for name, value in values.items()
    }
