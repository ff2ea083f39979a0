"""Pictures of checkpoints as hyper-model + LoRAs beside those of the originals: all of it but the drawing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

from hyper_merge.errors import PictureError
from hyper_merge.operations.compare.grid import Band, Cell, draw_grid
from hyper_merge.operations.compare.image_difference import (
    AMPLIFIED,
    LEVELS,
    PERCEPTUAL,
    Distance,
    difference_picture,
    mean_difference,
    perceptual_distance,
)
from hyper_merge.operations.compare.records import (
    ComparisonFigures,
    ComparisonRecord,
    free_comparison_name,
    save_comparison,
)
from hyper_merge.operations.compare.request import (
    CompareRequest,
    Draw,
    PictureKey,
    Subject,
    plan_pictures,
)
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.hash_cache import current_time
from hyper_merge.runs.integrity import require_hyper_model, require_own
from hyper_merge.runs.originals import locate_sources
from hyper_merge.runs.run import Run, load_run
from hyper_merge.runs.weighted_loras import find_row, prompt_tags_of, source_of, weighted_loras_of
from hyper_merge.runtime.progress import Progress

ROWS: Final[Mapping[str, str]] = {
    "restored": "hyper-model + LoRAs",
    "original": "original",
    "average": "hyper-model alone",
}
"""What the rows of the grid are called."""

_DIFFERENCES: Final[Mapping[str, str]] = {
    "restored": f"difference, {AMPLIFIED} times",
    "average": f"alone, difference, {AMPLIFIED} times",
}


@dataclass(frozen=True)
class ImageGenerator:
    """What draws the pictures.

    Attributes:
        host: Its name, for people.
        draw: Makes a picture.
        refusal: Why a checkpoint cannot be loaded there, in words; empty where it can.
    """

    host: str
    draw: Draw
    refusal: Callable[[Path], str] = lambda _path: ""


def run_comparison(
    order: CompareRequest, studio: ImageGenerator, folders: Folders, progress: Progress
) -> ComparisonRecord:
    """Draws all pictures and saves the grid; on any failure nothing is written.

    Args:
        order: what the user asks for.
        studio: what draws.
        folders: where the run is, its LoRAs, hyper-model and originals.
        progress: progress and interrupt.

    Raises:
        HyperMergeError: an unknown run or checkpoint, files that are missing or were changed, a
            hyper-model that the host cannot load, or the user's interrupt.
    """
    run = load_run(folders, order.run)
    hyper_model = require_hyper_model(run)
    problem = studio.refusal(hyper_model)
    if problem:
        raise PictureError(f"{hyper_model.name} cannot be drawn with: {problem}")
    checking, finding, drawing = progress.split([1.0, 1.0, 48.0])
    files = {term.path: None for name in order.checkpoints for term in weighted_loras_of(run, name)}
    require_own(run, list(files), checking)
    subjects = _subjects(run, order, studio, folders, finding)
    pictures = _draw(order, hyper_model, subjects, studio, drawing)
    distance = perceptual_distance((order.settings.width, order.settings.height))
    figures = tuple(_figures(pictures, order, distance))
    found = ComparisonRecord(
        run=run.name,
        name=free_comparison_name(run),
        created=current_time(),
        host=studio.host,
        hyper_model=hyper_model.name,
        settings=order.settings,
        tags={subject.name: subject.tags for subject in subjects},
        originals={each.name: each.original.name for each in subjects if each.original},
        notes=tuple(subject.note for subject in subjects if subject.note),
        figures=figures,
        measure=PERCEPTUAL if distance else "",
    )
    progress.report("saving the grid", 1.0)
    save_comparison(run, found, _grid(found, order, subjects, pictures))
    return found


def caption(figures: ComparisonFigures, row: str) -> str:
    """What stands below a picture: how far it is from the original's; empty where there is none."""
    if row not in figures.pixels:
        return ""
    found = figures.pixels[row]
    text = f"{found:.2f} of {LEVELS} ({found / LEVELS:.1%})"
    if row in figures.perceptual:
        text += f", {PERCEPTUAL} {figures.perceptual[row]:.3f}"
    return text


def _subjects(
    run: Run, order: CompareRequest, studio: ImageGenerator, folders: Folders, progress: Progress
) -> tuple[Subject, ...]:
    """The checkpoints, each once, with their originals as far as they can be drawn."""
    names = dict.fromkeys(find_row(run, name)[0].name for name in order.checkpoints)
    sources = [source_of(run, name) for name in names]
    found = []
    for checkpoint, original in zip(names, locate_sources(sources, folders, progress), strict=True):
        name = original.source.name
        note = {
            "there": studio.refusal(original.path) if original.state == "there" else "",
            "changed": "it was changed since",
            "missing": "it is not there",
        }[original.state]
        found.append(
            Subject(
                checkpoint,
                prompt_tags_of(run, checkpoint),
                None if note else original.path,
                f"{name} is left out: {note}" if note else "",
            )
        )
    return tuple(found)


def _draw(
    order: CompareRequest,
    hyper_model: Path,
    subjects: Sequence[Subject],
    studio: ImageGenerator,
    progress: Progress,
) -> dict[PictureKey, Image.Image]:
    plan = plan_pictures(order, hyper_model, subjects)
    pictures: dict[PictureKey, Image.Image] = {}
    parts = progress.split([1.0] * len(plan))
    for number, ((key, picture), part) in enumerate(zip(plan.items(), parts, strict=True), 1):
        phase = f"picture {number} of {len(plan)}: {key.words}"
        part.report(phase, 0.0)
        pictures[key] = studio.draw(picture, _saying(phase, part)).convert("RGB")
    return pictures


def _saying(phase: str, progress: Progress) -> Progress:
    """The control with words of its own."""
    return Progress(
        lambda _, fraction: progress.on_progress(phase, fraction),
        progress.should_stop,
        progress.warn,
    )


def _figures(
    pictures: Mapping[PictureKey, Image.Image], order: CompareRequest, distance: Distance | None
) -> list[ComparisonFigures]:
    found = []
    for name in dict.fromkeys(key.checkpoint for key in pictures if key.checkpoint):
        for prompt, seed in order.settings.bands:
            original = pictures.get(PictureKey("original", name, prompt, seed))
            drawn = {
                row: pictures[key]
                for row, key in _compared_with(name, prompt, seed).items()
                if original is not None and key in pictures
            }
            pixels = {
                row: mean_difference(each, original) for row, each in drawn.items() if original
            }
            seen = {
                row: distance(each, original)
                for row, each in drawn.items()
                if original and distance
            }
            found.append(ComparisonFigures(name, prompt, seed, pixels, seen))
    return found


def _compared_with(name: str, prompt: str, seed: int) -> dict[str, PictureKey]:
    """The pictures that are held against the original's."""
    return {
        "restored": PictureKey("restored", name, prompt, seed),
        "average": PictureKey("average", "", prompt, seed),
    }


def _grid(
    found: ComparisonRecord,
    order: CompareRequest,
    subjects: Sequence[Subject],
    pictures: Mapping[PictureKey, Image.Image],
) -> Image.Image:
    settings = order.settings
    figures = {(each.checkpoint, each.prompt, each.seed): each for each in found.figures}
    bands = []
    for prompt, seed in settings.bands:
        rows: dict[str, list[Cell]] = {}
        for subject in subjects:
            own = figures[subject.name, prompt, seed]
            for name, cell in _cells(order, own, pictures).items():
                rows.setdefault(name, []).append(cell)
        bands.append(Band(f"seed {seed}: {prompt}", rows))
    facts = (
        f"{found.run}: {settings.sampler}, {settings.steps} steps, CFG scale {settings.cfg_scale:g},"
        f" {settings.width}x{settings.height}"
    )
    heading = (facts, "figures: mean difference from the original")
    names = [subject.name for subject in subjects]
    return draw_grid(heading, names, bands, (settings.width, settings.height))


def _cells(
    order: CompareRequest, own: ComparisonFigures, pictures: Mapping[PictureKey, Image.Image]
) -> dict[str, Cell]:
    """One column of a band, by the names of its rows: the pair first, its figures below it."""
    original = pictures.get(PictureKey("original", own.checkpoint, own.prompt, own.seed))
    keys = _compared_with(own.checkpoint, own.prompt, own.seed)
    cells = {
        ROWS["restored"]: Cell(pictures[keys["restored"]]),
        ROWS["original"]: Cell(original, "not drawn", caption(own, "restored")),
    }
    if order.average:
        cells[ROWS["average"]] = Cell(pictures[keys["average"]], "", caption(own, "average"))
    if order.difference:
        for row, key in keys.items():
            if key in pictures:
                drawn = difference_picture(pictures[key], original) if original else None
                cells[_DIFFERENCES[row]] = Cell(drawn, "no original")
    return cells
