"""Names of the files that a transaction has for itself, beside those that it writes.

They are `.hyper-merge-<16 hex digits>` with a suffix. The first eight digits are the transaction's own:
in every folder its files begin with the same ones.
"""

from __future__ import annotations

import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Final

TEMPORARY: Final = ".tmp"
"""Suffix of a file that is being written."""

PREVIOUS: Final = ".old"
"""Suffix of the second name of a file that is being replaced, or the last one of a removed file."""

LOCK: Final = ".lock"
"""Suffix of the file in each folder that is locked while the transaction goes on."""

JOURNAL: Final = ".journal"
"""Suffix of the file that tells how to undo the transaction, until all of it is done."""

_PREFIX: Final = ".hyper-merge-"
JOURNALS: Final = f"{_PREFIX}*{JOURNAL}"
"""Pattern of all journals' names."""

_NAME: Final = re.compile(
    rf"{re.escape(_PREFIX)}(?P<owner>[0-9a-f]{{8}})[0-9a-f]{{8}}\.(tmp|old|lock|journal)"
)


def new_owner() -> str:
    """Returns the eight digits with which all names of a new transaction begin."""
    return secrets.token_hex(4)


def temporary_path(path: Path, suffix: str, owner: str | None = None) -> Path:
    """Returns a name beside a file that nothing else has.

    Args:
        path: the file that will be written, replaced or removed.
        suffix: one of the four above.
        owner: the transaction's digits; None outside of one.
    """
    return path.with_name(f"{_PREFIX}{owner or new_owner()}{secrets.token_hex(4)}{suffix}")


def owner_of(name: str) -> str | None:
    """Returns the digits of the transaction that a file belongs to; None for any other file."""
    match = _NAME.fullmatch(name)
    return match["owner"] if match else None


def own_files(folder: Path) -> list[Path]:
    """Returns all transactions' own files in a folder; none where it cannot be read."""
    with suppress(OSError):
        return [path for path in folder.iterdir() if owner_of(path.name) is not None]
    return []
