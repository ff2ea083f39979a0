"""`hyper-merge runs`: lists what was merged earlier; `hyper-merge runs delete` deletes a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hyper_merge.cli.arguments import OUTPUT_HELP, add_output_folder, finish_parser
from hyper_merge.cli.output import say
from hyper_merge.errors import RunError

if TYPE_CHECKING:
    from hyper_merge.runs.run import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the folder, and the parser of `delete`."""
    add_output_folder(parser)
    delete = parser.add_subparsers(metavar="delete").add_parser(
        "delete", help="delete a run with its LoRAs, and its hyper-model if nothing else needs it"
    )
    delete.add_argument("name", metavar="NAME")
    delete.add_argument("--yes", action="store_true", help="do not ask")
    # Suppressed where absent: a default would undo what was said before "delete".
    delete.add_argument(
        "--output", type=Path, default=argparse.SUPPRESS, metavar="FOLDER", help=OUTPUT_HELP
    )
    finish_parser(delete, _delete)


def run_command(options: argparse.Namespace) -> None:
    """Prints a line for each run; whatever is damaged is a note on standard error."""
    from hyper_merge.runs.fit_records import load_fits
    from hyper_merge.runs.folders import Folders
    from hyper_merge.runs.lora_runs import list_all_runs

    folders = Folders.under(options.output)
    runs, problems = list_all_runs(folders)
    of_runs = (problem for run in runs for problem in (*run.problems, *load_fits(run)[1]))
    for problem in (*problems, *of_runs):
        say(f"note: {problem}", sys.stderr)
    say("\n".join(map(_run_line, runs)) or f"no runs in {folders.runs}")


def _run_line(run: Run) -> str:
    from hyper_merge.runs.fit_records import load_fits

    report, inputs = run.report, "LoRAs" if run.of_loras else "checkpoints"
    ranks = ", ".join(map(str, run.recipe.ranks))
    missing = f"; missing: {', '.join(path.name for path in run.missing)}" if run.missing else ""
    fits, _ = load_fits(run)
    fitted = ", ".join(f"{record.row.name} {record.fidelity:.0%}" for record in fits)
    later = f"; fitted: {fitted}" if fits else ""
    return (
        f"{run.name}: {run.created[:10]}, {run.family}, {len(report.checkpoints)} {inputs}, ranks {ranks},"
        f" explained {report.fidelity_mean:.0%} (mean), {report.worst.fidelity:.0%} (worst)"
        f"{later}{missing}"
    )


def _delete(options: argparse.Namespace) -> None:
    from hyper_merge.runs.deletion import delete_run, files_of
    from hyper_merge.runs.folders import Folders
    from hyper_merge.runs.lora_runs import load_any_run

    folders = Folders.under(options.output)
    run = load_any_run(folders, options.name)
    for path in files_of(run, folders):
        say(str(path))
    if not (options.yes or _agrees("delete these files? [y/N] ")):
        raise RunError(f"the run {run.name} was left as it is", hint="answer y, or give --yes")
    say(f"deleted {len(delete_run(run, folders))} files of the run {run.name}")


def _agrees(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False
