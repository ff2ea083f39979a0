"""Small texts of the cache, which several processes read and write and every one can do without."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.errors import OutputError
from hyper_merge.runtime.file_lock import patiently


def put_text(path: Path, content: str) -> None:
    """Replaces a text file; one that cannot be replaced stays as it was, for no work fails by it.

    Windows refuses while another process reads the file, which takes a moment: it is tried again.
    """

    def put() -> None:
        with FileTransaction(overwrite=True) as outputs:
            outputs.text(path, content)

    with suppress(OutputError):
        patiently(put)
