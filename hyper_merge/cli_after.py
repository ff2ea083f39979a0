"""Commands for what follows a merge, or does without one: `hyper-merge extract | export`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from hyper_merge import export, extract
from hyper_merge.cli_parts import finish, say
from hyper_merge.errors import RecipeError
from hyper_merge.folders import Folders
from hyper_merge.progress import progress_bar
from hyper_merge.recipe import SettingError
from hyper_merge.recipe_values import plain_value

_NUMBERS: Final = ("rank", "seed")  # the others are text, whatever they look like

_T = TypeVar("_T")


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds all of them to the command line's own."""
    _add_extract(commands.add_parser("extract", help="make the LoRA that turns A into B"))
    _add_export(commands.add_parser("export", help="make one LoRA per checkpoint of a run"))


def _add_extract(parser: argparse.ArgumentParser) -> None:
    parser.description = "Makes the LoRA that turns checkpoint A into checkpoint B."
    parser.add_argument("base", metavar="A", help="the checkpoint that the LoRA is added to")
    parser.add_argument("checkpoint", metavar="B", help="the checkpoint that comes of it")
    parser.add_argument("--rank", metavar="N", default="64", help="of the LoRA (default: 64)")
    parser.add_argument("--name", help="of the LoRA (default: B-from-A)")
    parser.add_argument(
        "--output", default="models", help="models folder, or FILE.safetensors (default: models)"
    )
    words = "stored in the file: float16, bfloat16 or float32 (default: float16)"
    parser.add_argument("--dtype", default="float16", help=words)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--seed", metavar="N", default="0", help="of everything random")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    finish(parser, _extract)


def _extract(options: argparse.Namespace) -> None:
    names = ("base", "checkpoint", "rank", "name", "output", "dtype", "device", "seed", "overwrite")
    wanted = _asked(extract.Extraction, options, names)
    with progress_bar() as control:
        extracted = extract.run_extract(wanted, control)
    say(extract.describe(extracted))


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.description = "Makes one LoRA that turns a run's hyper-model into a checkpoint."
    parser.add_argument("run", metavar="RUN", help="its name")
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="*", help="one or more")
    parser.add_argument("--all", action="store_true", help="every checkpoint of the run")
    words = "cut each layer down to this rank (default: the sum of the run's ranks, exact)"
    parser.add_argument("--rank", metavar="N", help=words)
    words = "the models folder (default: models)"
    parser.add_argument("--output", type=Path, default=Path("models"), metavar="FOLDER", help=words)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    finish(parser, _export)


def _export(options: argparse.Namespace) -> None:
    if options.all == bool(options.checkpoints):
        raise RecipeError(
            "expected the names of checkpoints, or else --all; hyper-merge runs lists the runs"
        )
    options.checkpoints = None if options.all else tuple(options.checkpoints)
    wanted = _asked(export.Export, options, ("run", "checkpoints", "rank", "overwrite"))
    with progress_bar() as control:
        exported = export.run_export(wanted, Folders.under(options.output), control)
    say(export.describe(exported, wanted.rank))


def _asked(kind: Callable[..., _T], options: argparse.Namespace, names: Sequence[str]) -> _T:
    """What the options say; a refusal names the option."""
    given = {name: getattr(options, name) for name in names}
    values = {
        name: plain_value(value) if name in _NUMBERS and value is not None else value
        for name, value in given.items()
    }
    try:
        return kind(**values)
    except SettingError as error:
        raise RecipeError(f"option --{error.key}: {error.problem}") from None
