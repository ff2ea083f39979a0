"""`hyper-merge app`: serves the tab as an app of its own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hyper_merge.cli.output import say
from hyper_merge.errors import AppError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the folder and where to listen."""
    parser.description = "Serves the tab for a WebUI-shaped models folder, until Ctrl-C."
    parser.add_argument("folder", nargs="?", type=Path, default=Path("models"))
    parser.add_argument(
        "--listen", metavar="ADDRESS", default="127.0.0.1", help="0.0.0.0 for all networks"
    )
    parser.add_argument("--port", type=int, default=7871)
    parser.add_argument("--auth", metavar="NAME:PASSWORD", help="what a browser must give")
    parser.add_argument("--api", action="store_true", help="serve an HTTP API too: see /docs there")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")


def run_command(options: argparse.Namespace) -> None:
    """Serves until Ctrl-C."""
    try:
        from hyper_merge.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("hyper_merge"):
            raise
        raise AppError(
            f"the app needs {error.name}, which is not installed",
            hint="run: python -m pip install -c constraints.txt -e '.[app]'",
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
