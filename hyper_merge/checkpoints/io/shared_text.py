"""Small texts of the cache, which several processes read and write and every one can do without."""

from __future__ import annotations

from pathlib import Path

from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.runtime.file_lock import patiently


def put_text(path: Path, content: str) -> None:
    """Replaces a text file.

    Windows refuses while another process reads the file, which takes a moment: it is tried again.

    Raises:
        OutputError: the file cannot be replaced and stays as it was.
    """

    def put() -> None:
        with FileTransaction(overwrite=True) as outputs:
            outputs.text(path, content)

    patiently(put)
