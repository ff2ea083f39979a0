"""The command line, `hyper-merge COMMAND`: its parser, its exit codes, and what it says of errors."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence

from hyper_merge import __version__
from hyper_merge.cli.arguments import finish_parser
from hyper_merge.cli.commands import COMMANDS, load_command
from hyper_merge.cli.output import escape_unknown_letters, say
from hyper_merge.errors import HyperMergeError, InterruptedRun
from hyper_merge.runtime.progress import STOPPED

SUCCESS, UNEXPECTED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0 for success, 2 for refused input, 130 after Ctrl-C, 1 for anything unexpected.
    """
    escape_unknown_letters()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser(arguments).parse_args(arguments)
    run_command: Callable[[argparse.Namespace], None] = options.run_command
    try:
        run_command(options)
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
    """Tells whether an error was raised on the way out after Ctrl-C, such as by work that was cancelled."""
    before = error.__cause__ or error.__context__
    return before is not None and (
        isinstance(before, KeyboardInterrupt) or _follows_interrupt(before)
    )


def _fail(message: str, code: int, options: argparse.Namespace) -> int:
    if options.debug:
        traceback.print_exc()
    say(f"hyper-merge: {message}", sys.stderr)
    return code


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Returns the parser of all commands, with the arguments of the one that is called."""
    parser = argparse.ArgumentParser(
        prog="hyper-merge",
        description="Distils checkpoints into one average and a few shared LoRAs.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    called = next((word for word in arguments if not word.startswith("-")), None)
    for name, explanation in COMMANDS.items():
        command_parser = commands.add_parser(name, help=explanation)
        if name == called:
            command = load_command(name)
            command.add_arguments(command_parser)
            finish_parser(command_parser, command.run_command)
    return parser
