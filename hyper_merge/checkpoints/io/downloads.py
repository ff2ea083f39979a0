"""Signs that a download of a file is still in progress, or was given up."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from hyper_merge.errors import CheckpointError

# What download programs append to the name of the file, or of their notes about it, until it is complete:
# aria2, browsers, wget-like tools, qBittorrent, uTorrent, BitComet, WinSCP, Opera, Free Download Manager.
_UNFINISHED: Final = (
    *(".aria2", ".aria2__temp", ".part", ".partial", ".crdownload", ".download", ".opdownload"),
    *(".!qB", ".!ut", ".bc!", ".filepart", ".fdmdownload", ".incomplete"),
)


def sign_of_download(path: Path) -> Path | None:
    """Returns the file beside another that says that it is still being downloaded; None for none."""
    signs = (path.with_name(path.name + suffix) for suffix in _UNFINISHED)
    return next((sign for sign in signs if sign.exists()), None)


def require_downloaded(path: Path) -> None:
    """Returns if nothing beside a file says that it is still being downloaded.

    Some programs give a file its whole size at once: what is missing holds zeros, which would be averaged.

    Raises:
        CheckpointError: there is such a sign; names it.
    """
    sign = sign_of_download(path)
    if sign is not None:
        raise CheckpointError(
            f"the download of {path.name} is not finished: {sign.name} stands beside it",
            hint=f"wait until it ends or begin it again; if {path.name} is complete, delete"
            f" {sign.name} or set damaged to accept",
            file=path,
        )
