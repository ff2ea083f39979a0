"""Describes the request for a comparison and plans its pictures; nothing is drawn here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

from PIL import Image

from hyper_merge.errors import PictureError
from hyper_merge.runtime.progress import Progress

RowName = Literal["restored", "original", "average"]

LARGEST_SEED: Final = 2**32 - 1  # that all hosts take
_STEPS: Final = (1, 150)
_CFG_SCALE: Final = (0.0, 30.0)
_SIDE: Final = (64, 2048)  # pixels
_SIDE_UNIT: Final = 8  # pixels of a picture to one of the latent image's
_MOST_PICTURES: Final = 200  # in one grid, which people will look at


@dataclass(frozen=True)
class PictureSettings:
    """The settings that all pictures of a comparison share.

    Attributes:
        prompts: One or more, without the run's LoRA tags.
        negative: Negative prompt; may be empty.
        sampler: As the host names it.
        steps: Of sampling.
        cfg_scale: How strictly the prompt is followed.
        width: Pixels, a multiple of 8.
        height: Pixels, a multiple of 8.
        seeds: One or more; each prompt is drawn with each.
    """

    prompts: tuple[str, ...]
    negative: str = ""
    sampler: str = ""
    steps: int = 20
    cfg_scale: float = 7.0
    width: int = 512
    height: int = 512
    seeds: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise PictureError("expected a prompt, one per line, got none", hint="write one")
        if not self.seeds:
            raise PictureError("expected a seed, such as 1, or several, such as 1, 2, got none")
        for name, value, (least, most) in (
            ("steps", self.steps, _STEPS),
            ("CFG scale", self.cfg_scale, _CFG_SCALE),
            ("width", self.width, _SIDE),
            ("height", self.height, _SIDE),
            *(("seed", seed, (0, LARGEST_SEED)) for seed in self.seeds),
        ):
            if not least <= value <= most:
                raise PictureError(f"{name}: expected {least:g} to {most:g}, got {value:g}")
        for name, side in (("width", self.width), ("height", self.height)):
            if side % _SIDE_UNIT:
                raise PictureError(
                    f"{name}: expected a multiple of {_SIDE_UNIT} pixels, got {side}",
                    hint=f"{side - side % _SIDE_UNIT} would do",
                )

    @property
    def bands(self) -> tuple[tuple[str, int], ...]:
        """Every prompt with every seed, each once."""
        pairs = ((prompt, seed) for prompt in self.prompts for seed in self.seeds)
        return tuple(dict.fromkeys(pairs))


@dataclass(frozen=True)
class CompareRequest:
    """The request for a comparison.

    Attributes:
        run: Its name.
        checkpoints: Of the run, or fitted onto it later.
        settings: Of all pictures.
        average: Whether the hyper-model alone is drawn too.
        difference: Whether the differences within each pair are drawn too.
    """

    run: str
    checkpoints: tuple[str, ...]
    settings: PictureSettings
    average: bool = False
    difference: bool = False

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise PictureError(
                "expected a checkpoint of the run, or several, got none", hint="pick one"
            )
        count = len(self.settings.bands) * (2 * len(self.checkpoints) + self.average)
        if count > _MOST_PICTURES:
            raise PictureError(
                f"that would be {count} pictures, more than {_MOST_PICTURES}",
                hint="take fewer checkpoints, prompts or seeds",
            )


@dataclass(frozen=True)
class Subject:
    """A checkpoint that is compared.

    Attributes:
        name: As the run calls it.
        tags: The prompt tags that turn the hyper-model into this checkpoint.
        original: Its file; None where it cannot be drawn.
        note: Why not; empty where it can.
    """

    name: str
    tags: str
    original: Path | None
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """One picture that a host is to draw: `settings` are those of all, `prompt` is this one's."""

    model: Path
    prompt: str  # with all tags
    seed: int
    settings: PictureSettings


class PictureKey(NamedTuple):
    """A picture's place in the grid."""

    row: RowName
    checkpoint: str  # empty for the average alone, which all of them share
    prompt: str  # without tags
    seed: int


Txt2Img: TypeAlias = "Callable[[Picture, Progress], Image.Image]"
"""Makes a picture; reports progress, 0..1; raises `InterruptedRun` when the user cancels."""


def plan_pictures(
    request: CompareRequest, hyper_model: Path, subjects: Sequence[Subject]
) -> dict[PictureKey, Picture]:
    """Returns all pictures in the best order: every model is loaded once.

    All of the hyper-model's come first, and of those the ones with the same LoRAs together.
    """
    plan: dict[PictureKey, Picture] = {}

    def add(row: RowName, checkpoint: str, model: Path, tags: str) -> None:
        for prompt, seed in request.settings.bands:
            whole = f"{prompt} {tags}".strip()
            plan[PictureKey(row, checkpoint, prompt, seed)] = Picture(
                model, whole, seed, request.settings
            )

    if request.average:
        add("average", "", hyper_model, "")
    for subject in subjects:
        add("restored", subject.name, hyper_model, subject.tags)
    for subject in subjects:
        if subject.original is not None:
            add("original", subject.name, subject.original, "")
    return plan


def infotext(settings: PictureSettings, models: Mapping[str, str]) -> str:
    """Returns the settings as WebUIs write them, which their PNG Info tab reads.

    Args:
        settings: of all pictures.
        models: further facts by their names.
    """
    facts = {
        "Steps": settings.steps,
        "Sampler": settings.sampler,
        "CFG scale": f"{settings.cfg_scale:g}",
        "Seed": settings.seeds[0],
        "Size": f"{settings.width}x{settings.height}",
        **models,
    }
    negative = [f"Negative prompt: {settings.negative}"] if settings.negative else []
    last = ", ".join(f"{name}: {value}" for name, value in facts.items())
    return "\n".join([*settings.prompts, *negative, last])
