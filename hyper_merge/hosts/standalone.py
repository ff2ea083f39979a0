"""A WebUI-shaped models folder without a WebUI."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from hyper_merge.hosts import diffusers_txt2img as diffusers_pictures
from hyper_merge.hosts.host import Defaults, GeneratorInfo
from hyper_merge.operations.compare.compare import ImageGenerator
from hyper_merge.runs.folders import Folders
from hyper_merge.runtime.progress import Progress

_SUFFIXES: Final = (".safetensors", ".ckpt")
_NOT_CHECKPOINTS: Final = (".vae.safetensors", ".vae.ckpt")  # as the WebUIs see it

_log = logging.getLogger(__name__)


class Standalone:
    """The host of those who have none: folders, and nothing to send prompts to."""

    title = "Hyper-Merge"
    has_txt2img = False

    def __init__(self, root: Path) -> None:
        """Names the folders; makes none.

        Args:
            root: the models folder, with checkpoints in `Stable-diffusion` and LoRAs in `Lora`.
        """
        self._folders = Folders.under(root)

    def checkpoints(self) -> dict[str, Path]:
        """Files below `Stable-diffusion`, sorted: relative path with `/` -> file."""
        folder = self._folders.models
        found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
        return dict(sorted(found.items(), key=lambda item: item[0].lower()))

    def known_hash(self, name: str) -> str | None:  # noqa: ARG002 - the protocol's
        """Unknown: nobody keeps them here."""
        return None

    def refresh(self) -> None:
        """Nothing to do: the folder is read whenever the list is asked for."""

    def folders(self) -> Folders:
        """Those below the models folder."""
        return self._folders

    def defaults(self) -> Defaults:
        """Those of the program; there are no styles to save."""
        return Defaults(save_styles=False)

    @contextmanager
    def running(self, task: str) -> Iterator[Progress]:  # noqa: ARG002 - the protocol's
        """Begins at once: nothing else uses the device."""
        yield Progress()

    def atelier(self) -> GeneratorInfo:
        """Those of diffusers, if it is installed."""
        return diffusers_pictures.atelier()

    @contextmanager
    def drawing(self, task: str) -> Iterator[tuple[Progress, ImageGenerator]]:  # noqa: ARG002 - the protocol's
        """Begins at once."""
        with diffusers_pictures.studio(self._folders) as studio:
            yield Progress(), studio

    def styles(self) -> set[str]:
        """None."""
        return set()

    def save_styles(self, prompts: Mapping[str, str]) -> None:
        """Nowhere to save them."""

    def remove_styles(self, names: Iterable[str]) -> None:
        """There are none."""

    def checkpoint_title(self, path: Path) -> str | None:  # noqa: ARG002 - the protocol's
        """Nothing to select it in."""
        return None

    def connect_send(self, button: Any, text: Any) -> None:
        """Nowhere to send it."""

    def log(self, error: BaseException) -> None:
        """To the program's log."""
        _log.error("unexpected error", exc_info=error)


def _files(folder: Path) -> Iterator[Path]:
    """Checkpoint files below a folder, through links as the WebUIs go, each folder once."""
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
    return listed and not name.startswith(".") and path.is_file()
