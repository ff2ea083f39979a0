"""Reads JSON files, and writes and reads files with a checksum that reveals damage."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

_CHECKSUM: Final = "checksum"
_CONTENT: Final = "content"
# Bytes: all files that are read like this are far smaller, and plain data take twenty times as much memory.
_LIMIT: Final = 16 * 2**20


def parse_json(text: str) -> Any:
    """Returns the plain data of a JSON text.

    Raises:
        ValueError: the text is no JSON, is nested too deeply, or holds half of a surrogate pair, which
            could be neither shown nor written; says where.
    """
    data = _parse(text)
    if "\\u" in text:
        json.dumps(data, ensure_ascii=False).encode()
    return data


def read_json(path: Path) -> Any:
    """Returns the plain data of a JSON file; the caller judges shape and values.

    Raises:
        ValueError: the file is damaged, or larger than 16 MiB; says how.
        OSError: the file is missing or cannot be read.
    """
    return parse_json(_read(path))


def _read(path: Path) -> str:
    size = path.stat().st_size
    if size > _LIMIT:
        raise ValueError(f"expected at most {_LIMIT:,} bytes, got {size:,}")
    return path.read_bytes().decode("utf-8")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error


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
    data = _parse(_read(path))  # keys may be paths, and paths hold what UTF-8 has no letter for
    if not isinstance(data, dict) or data.keys() != {_CHECKSUM, _CONTENT}:
        return data
    if data[_CHECKSUM] != _checksum(data[_CONTENT]):
        raise ValueError("its checksum is not that of its content")
    return data[_CONTENT]


def _checksum(content: Any) -> str:
    """Returns the SHA-256 of values, which does not depend on blanks and the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
