"""Implements the host without a WebUI: a models folder that is laid out like a WebUI's."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hyper_merge.hosts.diffusers_txt2img import describe_diffusers, open_diffusers
from hyper_merge.hosts.file_lists import CHECKPOINTS, LORAS, list_files
from hyper_merge.hosts.host import Defaults, GeneratorInfo
from hyper_merge.operations.compare.compare import ImageGenerator
from hyper_merge.runs.folders import Folders
from hyper_merge.runtime.progress import Progress

_log = logging.getLogger(__name__)


class Standalone:
    """A host of folders alone, with nothing to send prompts to."""

    title = "Hyper-Merge"
    has_txt2img = False
    takes_block_weights = False

    def __init__(self, root: Path) -> None:
        """Names the folders without creating them.

        Args:
            root: the models folder, with checkpoints in `Stable-diffusion` and LoRAs in `Lora`.
        """
        self._folders = Folders.under(root)

    def checkpoints(self) -> dict[str, Path]:
        """Returns the files below `Stable-diffusion`, sorted: relative path with `/` -> file."""
        return list_files([self._folders.models], CHECKPOINTS)

    def loras(self) -> dict[str, Path]:
        """Returns the files below `Lora`, likewise."""
        return list_files([self._folders.loras], LORAS)

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
