"""The command line: `hyper-merge merge | average | plan | inspect | runs | ... | demo | app`."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from hyper_merge import __version__
from hyper_merge.cli.output import finish, format_outcome, say
from hyper_merge.cli.plan_text import format_plan
from hyper_merge.cli.progress_bar import progress_bar, say_above
from hyper_merge.cli.run_commands import add_commands
from hyper_merge.errors import AppError, HyperMergeError, InterruptedRun, RecipeError, RunError
from hyper_merge.operations.demo import run_demo
from hyper_merge.operations.inspect_text import format_inspection
from hyper_merge.operations.merge.average import run_average
from hyper_merge.operations.merge.estimate import estimate_merge
from hyper_merge.operations.merge.merge import run_merge
from hyper_merge.operations.merge.plan import make_plan
from hyper_merge.operations.merge.preflight import Preflight, run_preflight
from hyper_merge.recipe.recipe import FIELDS, Recipe, load_recipe, option_help, recipe_from_options
from hyper_merge.runs.deletion import delete_run, files_of
from hyper_merge.runs.fit_records import load_fits
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import Run, list_runs, load_run
from hyper_merge.runtime.formatting import format_duration, format_size
from hyper_merge.runtime.progress import STOPPED, Progress

SUCCESS, UNEXPECTED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0 for success, 2 for refused input, 130 after Ctrl-C, 1 for anything unexpected.
    """
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
    except (KeyboardInterrupt, InterruptedRun):
        return _fail(STOPPED, INTERRUPTED, options)
    except HyperMergeError as error:
        return _fail(str(error), REFUSED, options)
    except Exception as error:
        if _follows_interrupt(error):
            return _fail(STOPPED, INTERRUPTED, options)
        message = f"unexpected {type(error).__name__}: {error}; --debug shows where"
        return _fail(message, UNEXPECTED, options)
    return SUCCESS


def _follows_interrupt(error: BaseException) -> bool:
    """Whether it was raised on the way out after Ctrl-C, such as by work that was called off."""
    before = error.__cause__ or error.__context__
    return before is not None and (
        isinstance(before, KeyboardInterrupt) or _follows_interrupt(before)
    )


def _fail(message: str, code: int, options: argparse.Namespace) -> int:
    if options.debug:
        traceback.print_exc()
    say(f"hyper-merge: {message}", sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hyper-merge",
        description="Distils checkpoints into one average and a few shared LoRAs.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, words in (
        ("merge", _merge, "make the hyper-model, the LoRAs and the report"),
        ("average", _average, "make the hyper-model alone"),
        (
            "plan",
            _plan,
            "say what LoRAs of which size would bring back; writes nothing but the cache",
        ),
    ):
        sub = commands.add_parser(name, help=words, description=words.capitalize() + ".")
        sub.add_argument(
            "recipe", nargs="?", type=Path, metavar="CONFIG.yaml", help="a recipe file"
        )
        sub.add_argument("--config", type=Path, metavar="CONFIG.yaml", help="the same")
        _add_fields(sub)
        finish(sub, command)
    inspect = commands.add_parser("inspect", help="say what files are, from their headers")
    inspect.add_argument("files", nargs="+", type=Path, metavar="FILE")
    finish(inspect, _inspect)
    _add_runs(commands.add_parser("runs", help="list or delete what was merged earlier"))
    add_commands(commands)
    demo = commands.add_parser("demo", help="make a family of small checkpoints and merge it")
    demo.add_argument("folder", nargs="?", type=Path, default=Path("hyper-merge-demo"))
    finish(demo, _demo)
    _add_app(commands.add_parser("app", help="open the tab as an app of its own"))
    return parser


def _add_app(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serves the tab for a WebUI-shaped models folder, until Ctrl-C."
    parser.add_argument("folder", nargs="?", type=Path, default=Path("models"))
    parser.add_argument(
        "--listen", metavar="ADDRESS", default="127.0.0.1", help="0.0.0.0 for all networks"
    )
    parser.add_argument("--port", type=int, default=7871)
    parser.add_argument("--auth", metavar="NAME:PASSWORD", help="what a browser must give")
    parser.add_argument("--api", action="store_true", help="serve an HTTP API too: see /docs there")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    finish(parser, _app)


def _add_runs(parser: argparse.ArgumentParser) -> None:
    words = "the models folder (default: models)"
    parser.add_argument("--output", type=Path, default=Path("models"), metavar="FOLDER", help=words)
    finish(parser, _runs)
    delete = parser.add_subparsers(metavar="delete").add_parser(
        "delete", help="delete a run with its LoRAs, and its hyper-model if nothing else needs it"
    )
    delete.add_argument("name", metavar="NAME")
    delete.add_argument("--yes", action="store_true", help="do not ask")
    # Suppressed where absent: a default would undo what was said before "delete".
    delete.add_argument(
        "--output", type=Path, default=argparse.SUPPRESS, metavar="FOLDER", help=words
    )
    finish(delete, _delete)


def _add_fields(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings (they win over the recipe file)")
    for field in FIELDS:
        words = option_help(field).replace("%", "%%")  # which argparse formats
        if field.takes == "flag":
            group.add_argument(field.option, action="store_const", const="true", help=words)
        else:
            nargs = "+" if field.takes == "many" else None
            group.add_argument(field.option, nargs=nargs, metavar=field.metavar, help=words)


def _recipe(options: argparse.Namespace) -> Recipe:
    given = {field.name: getattr(options, field.name) for field in FIELDS}
    overrides = {name: value for name, value in given.items() if value is not None}
    if options.recipe and options.config:
        raise RecipeError(f"two recipe files were given: {options.recipe} and {options.config}")
    path = options.recipe or options.config
    return load_recipe(path, overrides) if path else recipe_from_options(overrides)


def _merge(options: argparse.Namespace) -> None:
    with progress_bar() as progress:
        preflight = _examined(_recipe(options), progress)
        takes = estimate_merge(preflight)
        say_above(
            f"{len(preflight.inputs.headers)} checkpoints; {format_duration(takes.seconds)},"
            f" {format_size(takes.memory)} of memory and at most {format_size(takes.disk)} of disk"
        )
        merged = run_merge(preflight, progress)
    say(format_outcome(merged))


def _average(options: argparse.Namespace) -> None:
    with progress_bar() as progress:
        path = run_average(_examined(_recipe(options), progress), progress)
    say(f"hyper-model: {path}")


def _plan(options: argparse.Namespace) -> None:
    with progress_bar() as progress:
        plan = make_plan(_examined(_recipe(options), progress), progress)
    say(format_plan(plan))


def _inspect(options: argparse.Namespace) -> None:
    say(format_inspection(options.files))


def _runs(options: argparse.Namespace) -> None:
    runs, problems = list_runs(Folders.under(options.output))
    of_runs = (problem for run in runs for problem in (*run.problems, *load_fits(run)[1]))
    for problem in (*problems, *of_runs):
        say(f"note: {problem}", sys.stderr)
    say("\n".join(map(_run_line, runs)) or f"no runs in {Folders.under(options.output).runs}")


def _run_line(run: Run) -> str:
    shares = [row.explained for row in run.report.checkpoints]
    ranks = ", ".join(map(str, run.recipe.ranks))
    lost = f"; missing: {', '.join(path.name for path in run.missing)}" if run.missing else ""
    fits, _ = load_fits(run)
    fitted = ", ".join(f"{each.row.name} {each.explained:.0%}" for each in fits)
    later = f"; fitted: {fitted}" if fits else ""
    return (
        f"{run.name}: {run.created[:10]}, {run.family}, {len(shares)} checkpoints, ranks {ranks},"
        f" explained {min(shares):.0%} to {max(shares):.0%}{later}{lost}"
    )


def _delete(options: argparse.Namespace) -> None:
    folders = Folders.under(options.output)
    run = load_run(folders, options.name)
    for path in files_of(run, folders):
        say(str(path))
    if not (options.yes or _agrees("delete these files? [y/N] ")):
        raise RunError(f"the run {run.name} was left as it is; answer y, or give --yes")
    say(f"deleted {len(delete_run(run, folders))} files of the run {run.name}")


def _agrees(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _demo(options: argparse.Namespace) -> None:
    with progress_bar() as progress:
        merged = run_demo(options.folder, progress)
    say(format_outcome(merged))


def _app(options: argparse.Namespace) -> None:
    try:
        from hyper_merge.cli import app  # noqa: PLC0415 - gradio is an extra, and takes seconds
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("hyper_merge"):
            raise
        raise AppError(
            f"the app needs {error.name}, which is not installed;"
            " run: python -m pip install -c constraints.txt -e '.[app]'"
        ) from error
    auth = app.parse_auth(options.auth) if options.auth else None
    listening = app.Listening(options.listen, options.port, auth, options.open)
    page = app.build_app(options.folder)
    api = app.build_api(options.folder, auth) if options.api else None
    if listening.is_open:
        say(
            "warning: everyone on the network can use this page; --auth NAME:PASSWORD protects it",
            sys.stderr,
        )
    say(f"Hyper-Merge: http://{options.listen}:{options.port} for {options.folder}; Ctrl-C ends it")
    app.serve(page, listening, api)


def _examined(recipe: Recipe, progress: Progress) -> Preflight:
    preflight = run_preflight(recipe)
    for warning in preflight.warnings:
        progress.warn(warning)
    return preflight
