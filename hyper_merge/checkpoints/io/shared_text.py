"""Small texts of the cache, which several processes read and write and every one can do without."""

from __future__ import annotations

from pathlib import Path

from hyper_merge.checkpoints.io.transaction import FileTransaction


def put_text(path: Path, content: str) -> None:
    """Replaces a text file, also one that another process reads for a moment.

    Raises:
        OutputError: the file cannot be replaced and stays as it was.
    """
    with FileTransaction(overwrite=True) as outputs:
        outputs.text(path, content)
