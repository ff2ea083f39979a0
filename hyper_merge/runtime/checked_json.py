"""JSON files that carry a checksum of their content, so that damage is told from what was written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

_CHECKSUM: Final = "checksum"
_CONTENT: Final = "content"
_LIMIT: Final = 64 * 2**20  # bytes; what is kept like this is far smaller


def sealed(content: Any) -> str:
    """The text of a file that holds plain data together with its checksum."""
    return json.dumps({_CHECKSUM: _checksum(content), _CONTENT: content}, indent=1)


def read_sealed(path: Path) -> Any:
    """The content of a file that `sealed` made, or all that one without a checksum holds.

    Earlier versions wrote no checksum; the caller judges shape and values in either case.

    Raises:
        ValueError: the file is damaged; says how.
        OSError: the file is missing or cannot be read.
    """
    if path.stat().st_size > _LIMIT:
        raise ValueError(f"expected at most {_LIMIT:,} bytes, got {path.stat().st_size:,}")
    try:
        found = json.loads(path.read_bytes().decode("utf-8"))
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error
    if not isinstance(found, dict) or found.keys() != {_CHECKSUM, _CONTENT}:
        return found
    if found[_CHECKSUM] != _checksum(found[_CONTENT]):
        raise ValueError("its checksum is not that of its content")
    return found[_CONTENT]


def _checksum(content: Any) -> str:
    """Of the values, whatever blanks and order of keys they were written with."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
