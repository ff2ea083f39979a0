"""Reads JSON files, and writes and reads files with a checksum that reveals damage."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

_CHECKSUM: Final = "checksum"
_CONTENT: Final = "content"
_LARGEST: Final = 1e100  # of amounts
_LIMIT: Final = 64 * 2**20  # bytes; all files that are read like this are far smaller


def parse_json(text: str) -> Any:
    """Returns the plain data of a JSON text.

    Raises:
        ValueError: the text is no JSON, or nested too deeply; says where.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error


def read_json(path: Path) -> Any:
    """Returns the plain data of a JSON file; the caller judges shape and values.

    Raises:
        ValueError: the file is damaged, or larger than 64 MiB; says how.
        OSError: the file is missing or cannot be read.
    """
    size = path.stat().st_size
    if size > _LIMIT:
        raise ValueError(f"expected at most {_LIMIT:,} bytes, got {size:,}")
    return parse_json(path.read_bytes().decode("utf-8"))


def require_amounts(data: Any, what: str) -> dict[str, float]:
    """Returns plain data that are numbers of 0 or more by name, small enough to be multiplied and added.

    Args:
        data: of a JSON file.
        what: names them in messages.

    Raises:
        ValueError: they are something else; the message says where.
    """
    if not isinstance(data, dict):
        raise ValueError(f"expected {what} by name")  # noqa: TRY004 - the file is wrong
    for name, value in data.items():
        if type(value) not in (int, float) or not 0 <= value <= _LARGEST:
            raise ValueError(f"expected a number of 0 or more in {what}, {name}, got {value!r:.80}")
    return dict(data)


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
    data = read_json(path)
    if not isinstance(data, dict) or data.keys() != {_CHECKSUM, _CONTENT}:
        return data
    if data[_CHECKSUM] != _checksum(data[_CONTENT]):
        raise ValueError("its checksum is not that of its content")
    return data[_CONTENT]


def _checksum(content: Any) -> str:
    """Returns the SHA-256 of values, which does not depend on blanks and the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
