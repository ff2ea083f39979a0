"""Defines the protocol of a host, the program around us, which hides all differences between hosts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hyper_merge.errors import CheckpointError
from hyper_merge.operations.compare.compare import ImageGenerator
from hyper_merge.recipe.default_ranks import DEFAULT_WORD
from hyper_merge.runs.folders import Folders
from hyper_merge.runtime.progress import Progress


@dataclass(frozen=True)
class Defaults:
    """The values of the form before the user touches it."""

    ranks: str = DEFAULT_WORD
    save_styles: bool = True


@dataclass(frozen=True)
class GeneratorInfo:
    """The samplers of a host's image generator, or why it has none.

    Attributes:
        samplers: Their names; the first one is the default.
        problem: Why no picture can be made here, and advice; empty where one can be made.
    """

    samplers: tuple[str, ...] = ()
    problem: str = ""


class Host(Protocol):
    """A program with checkpoints, folders and perhaps a prompt to send to."""

    @property
    def title(self) -> str:
        """The host's display name: "AUTOMATIC1111", "Forge" or "Hyper-Merge"."""

    @property
    def has_txt2img(self) -> bool:
        """Tells whether prompts can be sent to it and styles be saved."""

    @property
    def takes_block_weights(self) -> bool:
        """Tells whether prompt tags may hold weights by block (`:lbw=`)."""

    def checkpoints(self) -> dict[str, Path]:
        """Returns the host's list as it is now: name without hash, `/` between folders -> file."""

    def loras(self) -> dict[str, Path]:
        """Returns the LoRA files of the host's folders as they are now, named like checkpoints."""

    def known_hash(self, name: str) -> str | None:
        """Returns the first 10 hex digits of a listed checkpoint's sha256 if the host knows it.

        This never reads the file to compute the hash.
        """

    def refresh(self) -> None:
        """Reads the lists of checkpoints and LoRAs from the disk again."""

    def folders(self) -> Folders:
        """Returns where outputs go."""

    def defaults(self) -> Defaults:
        """Returns the values that the form starts with."""

    def running(self, task: str) -> AbstractContextManager[Progress]:
        """Waits for a turn of the host, frees its device memory, and restores all at the end.

        Args:
            task: the id by which the host shows the progress, "task(...)".

        Returns:
            A progress that drives the host's bar and obeys its stop buttons.
        """

    def generator_info(self) -> GeneratorInfo:
        """Returns the samplers of the host's image generator, or why it has none."""

    def drawing(self, task: str) -> AbstractContextManager[tuple[Progress, ImageGenerator]]:
        """Waits for a turn as `running` does, and yields a progress and a generator of pictures.

        The loaded model stays on the device; afterwards, even after an error, the checkpoint that was
        loaded before is loaded again.

        Raises:
            PictureError: no picture can be made here.
        """

    def styles(self) -> dict[str, str]:
        """Returns the prompts of all prompt styles by their names."""

    def save_styles(self, prompts: Mapping[str, str]) -> None:
        """Adds prompt styles; replaces those that Hyper-Merge has made.

        Args:
            prompts: name -> `{prompt}` and LoRA tags.

        Raises:
            OutputError: a name belongs to one of the user's styles, or the file cannot be written;
                no style has changed then.
        """

    def remove_styles(self, names: Iterable[str]) -> None:
        """Removes the styles among `names` that Hyper-Merge has made; leaves all others.

        Raises:
            OutputError: the file cannot be written; no style has changed then.
        """

    def checkpoint_title(self, path: Path) -> str | None:
        """Returns the title by which the host selects a checkpoint; None if it is not in the list."""

    def log(self, error: BaseException) -> None:
        """Writes an unexpected error in full to the host's log."""


def require_listed_file(name: str, listed: Mapping[str, Path]) -> Path:
    """Returns the file of a name in the host's list.

    Raises:
        CheckpointError: the name is not in the list (any more), or its file is gone.
    """
    if name not in listed:
        raise CheckpointError(
            f"{name} is no longer in the list", hint="press Refresh and pick again"
        )
    if not listed[name].exists():
        raise CheckpointError(f"{name} is no longer there", hint="press Refresh and pick again")
    return listed[name]
