"""`hyper-merge loras`: turns many LoRAs of one base into a few shared ones."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Final

from hyper_merge.cli.arguments import add_create_option, require_folder
from hyper_merge.cli.output import say
from hyper_merge.cli.progress_bar import progress_bar
from hyper_merge.recipe.fields import FIELDS

_SETTINGS: Final = frozenset(
    {
        *("name", "ranks", "budget", "target", "topup", "device", "dtype", "lora_dtype"),
        *("iterations", "tolerance", "output", "overwrite", "seed", "method", "allocation"),
        *("multipliers", "fit_weights", "layer_weights", "damaged"),
    }
)
_HELP: Final[Mapping[str, str]] = {
    "name": "first part of the shared LoRAs' names (default: from the first file's name)",
    "dtype": "stored in the files: float16, bfloat16 or float32 (default: float16)",
    "fit_weights": "how much each LoRA counts in the fit",
    "layer_weights": "how changes count: plain, as squares of weights; or layout, by how often a"
    " layer is applied; without a checkpoint nothing can be run (default: plain)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the LoRAs and the settings that go with them."""
    parser.description = (
        "Turns LoRAs of one base into a few shared LoRAs, with one multiplier each for every one of"
        " them. No checkpoint is needed."
    )
    parser.add_argument("loras", metavar="LORA", nargs="+", help="two files or more")
    for field in FIELDS:
        if field.name not in _SETTINGS:
            continue
        text = _HELP.get(field.name, field.help).replace("%", "%%")
        if field.takes == "flag":
            parser.add_argument(field.option, action="store_const", const="true", help=text)
        else:
            nargs = "+" if field.takes == "many" else None
            parser.add_argument(field.option, nargs=nargs, metavar=field.metavar, help=text)
    parser.add_argument(
        "--plan",
        action="store_true",
        help="write nothing; forecast what shared LoRAs of which size would explain",
    )
    add_create_option(parser)


def run_command(options: argparse.Namespace) -> None:
    """Writes the shared LoRAs and prints their report."""
    from hyper_merge.cli.plan_text import format_plan
    from hyper_merge.operations.loras.plan import plan_share
    from hyper_merge.operations.loras.share import (
        DEFAULTS,
        preflight_share,
        require_several,
        run_share,
    )
    from hyper_merge.operations.loras.text import format_share
    from hyper_merge.operations.merge.naming import suggest_name
    from hyper_merge.recipe.loading import recipe_from_options

    values = {name: getattr(options, name) for name in _SETTINGS}
    given = {name: value for name, value in values.items() if value is not None}
    require_several(options.loras)
    given.setdefault("name", suggest_name(options.loras))
    recipe = recipe_from_options({**DEFAULTS, **given, "models": options.loras})
    with progress_bar() as progress:
        validated = preflight_share(recipe)
        if options.plan:
            say(format_plan(plan_share(validated, progress), of_loras=True))
            return
        if not options.create:
            require_folder(validated.recipe.output)
        for warning in validated.merge.warnings:
            progress.warn(warning)
        shared = run_share(validated, progress)
    say(format_share(shared))
