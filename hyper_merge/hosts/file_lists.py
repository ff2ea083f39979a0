"""Lists the files below a folder as WebUIs do: links are followed, hidden files and folders left out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

CHECKPOINTS: Final = (".safetensors", ".ckpt", ".gguf")
LORAS: Final = (".safetensors", ".pt", ".ckpt")
_NOT_LISTED: Final = (".vae.safetensors", ".vae.ckpt", ".vae.pt")  # as the WebUIs see it

_log = logging.getLogger(__name__)


def list_files(folders: Sequence[Path], suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Returns the files below some folders: relative path with `/` -> file.

    They are sorted by folder and name. A path that an earlier folder has too begins with the name of
    its folder.

    Args:
        folders: that need not exist; one that is given twice counts once.
        suffixes: of the files, in small letters.
    """
    listed: dict[str, Path] = {}
    for folder in dict.fromkeys(folders):
        files = {
            path.relative_to(folder).as_posix(): path for path in _files_below(folder, suffixes)
        }
        for name, path in sorted(files.items(), key=lambda item: item[0].lower()):
            listed.setdefault(name if name not in listed else f"{folder.name}/{name}", path)
    return listed


def _files_below(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yields the files; each folder is looked into once, whatever links lead there."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()  # a link to where we have been
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if _is_listed(Path(place, name), suffixes))


def _is_listed(path: Path, suffixes: tuple[str, ...]) -> bool:
    name = path.name.lower()
    listed = name.endswith(suffixes) and not name.endswith(_NOT_LISTED)
    if not listed or name.startswith(".") or not path.is_file():
        return False
    try:
        str(path).encode()
    except UnicodeEncodeError:  # neither a page nor an answer could hold the name
        _log.warning("%s is left out: its name is not valid UTF-8; rename it", ascii(str(path)))
        return False
    return True
