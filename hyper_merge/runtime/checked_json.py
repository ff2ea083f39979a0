"""JSON files that carry a checksum of their content, so that damage is noticed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

_CHECKSUM: Final = "checksum"
_CONTENT: Final = "content"
_LIMIT: Final = 64 * 2**20  # bytes; real files are far smaller


def sealed(content: Any) -> str:
    """Returns the text of a file that holds plain data together with its checksum."""
    return json.dumps({_CHECKSUM: _checksum(content), _CONTENT: content}, indent=1)


def read_sealed(path: Path) -> Any:
    """Returns the content of a file that `sealed` made, or all of a file without a checksum.

    Earlier versions wrote no checksum; the caller judges shape and values in either case.

    Raises:
        ValueError: the file is damaged; the message says how.
        OSError: the file is missing or cannot be read.
    """
    if path.stat().st_size > _LIMIT:
        raise ValueError(f"expected at most {_LIMIT:,} bytes, got {path.stat().st_size:,}")
    try:
        data = json.loads(path.read_bytes().decode("utf-8"))
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error
    if not isinstance(data, dict) or data.keys() != {_CHECKSUM, _CONTENT}:
        return data
    if data[_CHECKSUM] != _checksum(data[_CONTENT]):
        raise ValueError("its checksum is not that of its content")
    return data[_CONTENT]


def _checksum(content: Any) -> str:
    """Returns a checksum of the values that is independent of blanks and of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
