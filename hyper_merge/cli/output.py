"""Messages of the command line."""

from __future__ import annotations

import sys
from typing import TextIO


def say(message: str, stream: TextIO | None = None) -> None:
    """Writes a message as one line or more, to standard output unless another stream is given."""
    stream = stream or sys.stdout
    stream.write(message if message.endswith("\n") else message + "\n")
    stream.flush()
