"""Implements the host without a WebUI: a models folder that is laid out like a WebUI's."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hyper_merge.hosts.diffusers_txt2img import describe_diffusers, open_diffusers
from hyper_merge.hosts.host import Defaults, GeneratorInfo
from hyper_merge.operations.compare.compare import ImageGenerator
from hyper_merge.runs.folders import Folders
from hyper_merge.runtime.progress import Progress

_SUFFIXES: Final = (".safetensors", ".ckpt", ".gguf")
_NOT_CHECKPOINTS: Final = (".vae.safetensors", ".vae.ckpt")  # as the WebUIs see it

_log = logging.getLogger(__name__)


class Standalone:
    """A host of folders alone, with nothing to send prompts to."""

    title = "Hyper-Merge"
    has_txt2img = False

    def __init__(self, root: Path) -> None:
        """Names the folders without creating them.

        Args:
            root: the models folder, with checkpoints in `Stable-diffusion` and LoRAs in `Lora`.
        """
        self._folders = Folders.under(root)

    def checkpoints(self) -> dict[str, Path]:
        """Returns the files below `Stable-diffusion`, sorted: relative path with `/` -> file."""
        folder = self._folders.models
        files = {path.relative_to(folder).as_posix(): path for path in _files_below(folder)}
        return dict(sorted(files.items(), key=lambda item: item[0].lower()))

    def known_hash(self, name: str) -> str | None:  # noqa: ARG002 - the protocol's
        """Returns None: no hashes are kept here."""
        return None

    def refresh(self) -> None:
        """Does nothing: the folder is read for every request of the list."""

    def folders(self) -> Folders:
        """Returns the folders below the models folder."""
        return self._folders

    def defaults(self) -> Defaults:
        """Returns the program's defaults; styles are off, since there are none."""
        return Defaults(save_styles=False)

    @contextmanager
    def running(self, task: str) -> Iterator[Progress]:  # noqa: ARG002 - the protocol's
        """Begins at once: nothing else uses the device."""
        yield Progress()

    def generator_info(self) -> GeneratorInfo:
        """Returns the samplers of diffusers, if it is installed."""
        return describe_diffusers()

    @contextmanager
    def drawing(self, task: str) -> Iterator[tuple[Progress, ImageGenerator]]:  # noqa: ARG002 - the protocol's
        """Draws with diffusers, and begins at once."""
        with open_diffusers(self._folders) as generator:
            yield Progress(), generator

    def styles(self) -> dict[str, str]:
        """Returns nothing: there are no styles."""
        return {}

    def save_styles(self, prompts: Mapping[str, str]) -> None:
        """Does nothing: there are no styles."""

    def remove_styles(self, names: Iterable[str]) -> None:
        """Does nothing: there are no styles."""

    def checkpoint_title(self, path: Path) -> str | None:  # noqa: ARG002 - the protocol's
        """Returns None: there is no list to select it in."""
        return None

    def log(self, error: BaseException) -> None:
        """Writes an unexpected error to the program's log."""
        _log.error("unexpected error", exc_info=error)


def _files_below(folder: Path) -> Iterator[Path]:
    """Yields the checkpoint files below a folder; follows links as the WebUIs do, each folder once."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()  # a link to where we have been
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if _is_checkpoint(Path(place, name)))


def _is_checkpoint(path: Path) -> bool:
    name = path.name.lower()
    listed = name.endswith(_SUFFIXES) and not name.endswith(_NOT_CHECKPOINTS)
    if not listed or name.startswith(".") or not path.is_file():
        return False
    try:
        str(path).encode()
    except UnicodeEncodeError:  # neither a page nor an answer could hold the name
        _log.warning("%s is left out: its name is not valid UTF-8; rename it", ascii(str(path)))
        return False
    return True
