"""Messages of the command line."""

from __future__ import annotations

import io
import sys
from typing import TextIO


def escape_unknown_letters() -> None:
    r"""Makes the standard streams write letters that their encoding lacks as codes, as in `\u6a21`.

    Piped output has the system's encoding, on Windows one of few letters, while files may be called
    anything; a message must not fail for a name in it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(message: str, stream: TextIO | None = None) -> None:
    """Writes a message as one line or more, to standard output unless another stream is given."""
    stream = stream or sys.stdout
    stream.write(message if message.endswith("\n") else message + "\n")
    stream.flush()
