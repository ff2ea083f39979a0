"""What the tab needs of the program around it; every difference between hosts is behind this."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hyper_merge.errors import CheckpointError
from hyper_merge.operations.compare.compare import ImageGenerator
from hyper_merge.runs.folders import Folders
from hyper_merge.runtime.progress import Progress


@dataclass(frozen=True)
class Defaults:
    """What the form holds before the user touches it."""

    ranks: str = "128, 64, 32, 16"
    save_styles: bool = True


@dataclass(frozen=True)
class GeneratorInfo:
    """What a host can draw with, before anything is drawn.

    Attributes:
        samplers: Their names, the one to begin with first.
        problem: Why no picture can be made here, with what to do; empty where one can.
    """

    samplers: tuple[str, ...] = ()
    problem: str = ""


class Host(Protocol):
    """A program with checkpoints, folders and perhaps a prompt to send to."""

    @property
    def title(self) -> str:
        """For people: "AUTOMATIC1111", "Forge" or "Hyper-Merge"."""

    @property
    def has_txt2img(self) -> bool:
        """Whether prompts can be sent and styles be saved."""

    def checkpoints(self) -> dict[str, Path]:
        """The host's own list as it is now: name without hash, `/` between folders -> file."""

    def known_hash(self, name: str) -> str | None:
        """First 10 hex digits of a listed checkpoint's sha256 if the host has it; never hashes."""

    def refresh(self) -> None:
        """Reads the lists of checkpoints and LoRAs anew from the disk."""

    def folders(self) -> Folders:
        """Where outputs go."""

    def defaults(self) -> Defaults:
        """What the form starts with."""

    def running(self, task: str) -> AbstractContextManager[Progress]:
        """A turn of the host's: waits for it, makes room on the device, puts all back at the end.

        Args:
            task: the id by which the host shows the progress, "task(...)".

        Returns:
            What a run is given: it drives the host's progress bar and hears its stop buttons.
        """

    def atelier(self) -> GeneratorInfo:
        """What there is to draw pictures with."""

    def drawing(self, task: str) -> AbstractContextManager[tuple[Progress, ImageGenerator]]:
        """As `running`, with the loaded model left where it is, to draw pictures.

        Afterwards the checkpoint is loaded again that was loaded before, however it ended.

        Raises:
            PictureError: no picture can be made here.
        """

    def styles(self) -> set[str]:
        """Names of all prompt styles."""

    def save_styles(self, prompts: Mapping[str, str]) -> None:
        """Adds prompt styles, or renews those of ours.

        Args:
            prompts: name -> `{prompt}` and LoRA tags.

        Raises:
            OutputError: a name belongs to a style of the user's, or the file cannot be written;
                no style has changed then.
        """

    def remove_styles(self, names: Iterable[str]) -> None:
        """Removes the styles of ours among `names`; others and unknown names are left.

        Raises:
            OutputError: the file cannot be written; no style has changed then.
        """

    def checkpoint_title(self, path: Path) -> str | None:
        """By what the host selects this checkpoint; None if it is not in its list."""

    def connect_send(self, button: Any, text: Any) -> None:
        """Makes a gradio button put a gradio text into the prompt of txt2img."""

    def log(self, error: BaseException) -> None:
        """Writes an unexpected error in full to the host's log."""


def file_of(name: str, listed: Mapping[str, Path]) -> Path:
    """The file of a name in the host's list.

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
