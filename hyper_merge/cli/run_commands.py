"""Commands for what follows a merge, or does without one: `hyper-merge extract | export | fit | ...`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from hyper_merge.cli.output import finish, format_outcome, say
from hyper_merge.cli.progress_bar import progress_bar
from hyper_merge.errors import RecipeError
from hyper_merge.operations import deletable as safe
from hyper_merge.operations import export
from hyper_merge.operations import extend as absorb
from hyper_merge.operations.deletable_text import format_deletion_report
from hyper_merge.operations.export_text import format_export
from hyper_merge.operations.extract import extract
from hyper_merge.operations.extract.text import format_extraction
from hyper_merge.operations.fit import fit
from hyper_merge.operations.fit import request as fit_job
from hyper_merge.operations.fit.text import format_fit, format_style
from hyper_merge.operations.restore import restore
from hyper_merge.operations.restore.text import format_restore
from hyper_merge.recipe.parsing import parse_share, plain_value
from hyper_merge.recipe.recipe import SettingError
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import load_run

_NUMBERS: Final = ("rank", "seed")  # the others are text, whatever they look like

_T = TypeVar("_T")


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds all of them to the command line's own."""
    _add_extract(commands.add_parser("extract", help="make the LoRA that turns A into B"))
    _add_export(commands.add_parser("export", help="make one LoRA per checkpoint of a run"))
    _add_fit(commands.add_parser("fit", help="find multipliers for a checkpoint outside of a run"))
    _add_absorb(commands.add_parser("absorb", help="merge a run's checkpoints and further ones"))
    _add_restore(commands.add_parser("restore", help="write a run's checkpoint as a full file"))
    _add_safe(commands.add_parser("safe", help="say which originals of a run could be deleted"))


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
    wanted = _asked(extract.ExtractRequest, options, names)
    with progress_bar() as progress:
        extracted = extract.run_extract(wanted, None, progress)
    say(format_extraction(extracted))


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.description = "Makes one LoRA that turns a run's hyper-model into a checkpoint."
    parser.add_argument("run", metavar="RUN", help="its name")
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="*", help="one or more")
    parser.add_argument("--all", action="store_true", help="every checkpoint of the run")
    words = "cut each layer down to this rank (default: the sum of the run's ranks, exact)"
    parser.add_argument("--rank", metavar="N", help=words)
    _add_output(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    finish(parser, _export)


def _export(options: argparse.Namespace) -> None:
    if options.all == bool(options.checkpoints):
        raise RecipeError(
            "expected the names of checkpoints, or else --all; hyper-merge runs lists the runs"
        )
    options.checkpoints = None if options.all else tuple(options.checkpoints)
    wanted = _asked(export.ExportRequest, options, ("run", "checkpoints", "rank", "overwrite"))
    with progress_bar() as progress:
        exported = export.run_export(wanted, Folders.under(options.output), progress)
    say(format_export(exported, wanted.rank))


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.description = "Finds the multipliers by which a run's LoRAs come nearest to a checkpoint that was not merged."
    parser.add_argument("run", metavar="RUN", help="its name")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the file")
    words = "a private LoRA of what remains: a rank, or what is to be explained in all"
    parser.add_argument("--topup", metavar="RANK|SHARE%", help=words)
    parser.add_argument("--name", help="by which the run knows it (default: the file's)")
    parser.add_argument("--style", action="store_true", help="print a line for styles.csv too")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--seed", metavar="N", default="0", help="of everything random")
    _add_output(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier fit")
    finish(parser, _fit)


def _fit(options: argparse.Namespace) -> None:
    folders = Folders.under(options.output)
    names = ("run", "checkpoint", "name", "topup", "device", "overwrite", "seed")
    wanted = _asked(fit_job.FitRequest, options, names)
    with progress_bar() as progress:
        fitted = fit.run_fit(wanted, folders, progress)
    run = load_run(folders, options.run)
    say(format_fit(fitted, run))
    if options.style:
        say(format_style(fitted, run))


def _add_absorb(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Makes a new run of a run's checkpoints and further ones. All are read again: the average is"
        " another one, and so is every deviation from it. What is used again are the run's multipliers,"
        " with those of the new checkpoints' fits, as one of the starts. The result is as exact as that"
        " of any merge. The old run stays as it is."
    )
    parser.add_argument("run", metavar="RUN", help="its name")
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", type=Path, help="the files")
    parser.add_argument("--name", help="of the new run (default: the old one's with +1, +2, ...)")
    _add_output(parser)
    finish(parser, _absorb)


def _absorb(options: argparse.Namespace) -> None:
    options.checkpoints = tuple(options.checkpoints)
    wanted = _asked(absorb.ExtendRequest, options, ("run", "checkpoints", "name"))
    with progress_bar() as progress:
        merged = absorb.run_extend(wanted, Folders.under(options.output), progress)
    say(format_outcome(merged))


def _add_restore(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes hyper-model and LoRAs, added up, as a checkpoint: one of the run's, or a mixture."
    )
    parser.add_argument("run", metavar="RUN", help="its name")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="of the run, or fitted")
    words = "shares of the run's checkpoints instead; the hyper-model has what is missing to 1"
    parser.add_argument("--mix", metavar="A:0.5,B:0.5", help=words)
    words = "FILE.safetensors (default: CHECKPOINT-restored among the checkpoints)"
    parser.add_argument("--to", metavar="FILE", type=Path, help=words)
    words = "float16, bfloat16 or float32 (default: the run's)"
    parser.add_argument("--dtype", help=words)
    _add_output(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    finish(parser, _restore)


def _restore(options: argparse.Namespace) -> None:
    if bool(options.checkpoint) == bool(options.mix):
        raise RecipeError("expected the name of a checkpoint, or else --mix with several")
    named = {options.checkpoint: 1.0}
    options.shares = restore.parse_mix(options.mix) if options.mix else named
    wanted = _asked(restore.RestoreRequest, options, ("run", "shares", "to", "dtype", "overwrite"))
    with progress_bar() as progress:
        restored = restore.run_restore(wanted, Folders.under(options.output), progress)
    say(format_restore(restored))


def _add_safe(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Says of every original of a run how much of it comes back, against a threshold, and what"
        " deleting it would free. It never deletes anything."
    )
    parser.add_argument("run", metavar="RUN", help="its name")
    words = "of all differences from the hyper-model, what must come back (default: 99%%)"
    parser.add_argument("--threshold", metavar="SHARE%", default="99%", help=words)
    _add_output(parser)
    finish(parser, _safe)


def _safe(options: argparse.Namespace) -> None:
    try:
        threshold = parse_share(options.threshold) or 1.0
    except RecipeError as error:
        raise RecipeError(f"option --threshold: {error}") from None
    with progress_bar() as progress:
        safety = safe.find_deletable(
            options.run, threshold, Folders.under(options.output), progress
        )
    say(format_deletion_report(safety))


def _add_output(parser: argparse.ArgumentParser) -> None:
    words = "the models folder (default: models)"
    parser.add_argument("--output", type=Path, default=Path("models"), metavar="FOLDER", help=words)


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
