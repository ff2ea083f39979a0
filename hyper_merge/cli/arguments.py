"""Arguments that several commands share, and the values that they give."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Final

from hyper_merge.errors import OutputError
from hyper_merge.recipe.plain_values import plain_value
from hyper_merge.runs.paths import path_exists

OUTPUT_HELP: Final = "the models folder (default: models)"

_NUMBERS: Final = ("rank", "seed")  # the others are text, whatever they look like


def add_output_folder(parser: argparse.ArgumentParser) -> None:
    """Adds the option for the models folder."""
    parser.add_argument(
        "--output", type=Path, default=Path("models"), metavar="FOLDER", help=OUTPUT_HELP
    )


def add_create_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option that makes the models folder."""
    parser.add_argument(
        "--create", action="store_true", help="make the models folder if it does not exist"
    )


def add_damaged_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option that accepts files which look damaged."""
    parser.add_argument(
        "--damaged",
        metavar="HOW",
        default="refuse",
        help="files that look damaged or like unfinished downloads: refuse, or accept",
    )


def require_folder(output: Path) -> None:
    """Returns if something is there: a mistyped folder would be noticed after long work.

    Raises:
        OutputError: nothing is there.
    """
    if not path_exists(output):
        raise OutputError(
            f"the models folder {output} does not exist",
            hint="give --output a folder that exists, such as the WebUI's models, or --create",
            file=output,
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
