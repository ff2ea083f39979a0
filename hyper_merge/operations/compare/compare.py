"""Compares pictures drawn with hyper-model and LoRAs with pictures drawn with the originals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from hyper_merge.errors import PictureError
from hyper_merge.operations.compare.grid import Band, Cell, draw_grid
from hyper_merge.operations.compare.image_difference import (
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
    PictureKey,
    Subject,
    Txt2Img,
    plan_pictures,
)
from hyper_merge.operations.compare.text import (
    DIFFERENCE_TITLES,
    ROW_TITLES,
    format_caption,
    format_heading,
    format_picture,
)
from hyper_merge.runs.folders import PICTURES, Folders
from hyper_merge.runs.hash_cache import current_time
from hyper_merge.runs.integrity import require_hyper_model, require_own
from hyper_merge.runs.originals import locate_sources
from hyper_merge.runs.run import Run, load_run
from hyper_merge.runs.weighted_loras import find_row, prompt_tags_of, source_of, weighted_loras_of
from hyper_merge.runtime.file_lock import alone
from hyper_merge.runtime.progress import Progress


@dataclass(frozen=True)
class ImageGenerator:
    """The host's means of drawing pictures.

    Attributes:
        host: Its display name.
        draw: Makes a picture.
        refusal: Says why a checkpoint cannot be loaded there; empty where it can.
    """

    host: str
    draw: Txt2Img
    refusal: Callable[[Path], str] = lambda _path: ""


def run_compare(
    request: CompareRequest, folders: Folders, progress: Progress, generator: ImageGenerator
) -> ComparisonRecord:
    """Draws all pictures and saves the grid; on any failure nothing is written.

    Args:
        request: run, files and options.
        folders: where the run is, its LoRAs, hyper-model and originals.
        progress: progress and interrupt.
        generator: draws the pictures.

    Raises:
        HyperMergeError: an unknown run or checkpoint, files that are missing or were changed, a
            hyper-model that the host cannot load, or the user's interrupt.
    """
    run = load_run(folders, request.run)
    hyper_model = require_hyper_model(run)
    problem = generator.refusal(hyper_model)
    if problem:
        raise PictureError(f"{hyper_model.name} cannot be drawn with: {problem}")
    checking, finding, drawing = progress.split([1.0, 1.0, 48.0])
    files = {
        lora.path: None for name in request.checkpoints for lora in weighted_loras_of(run, name)
    }
    require_own(run, list(files), checking)
    subjects = _subjects(run, request, generator, folders, finding)
    pictures = _draw(request, hyper_model, subjects, generator, drawing)
    distance = perceptual_distance((request.settings.width, request.settings.height))
    figures = tuple(_measure(pictures, request, distance))
    record = ComparisonRecord(
        run=run.name,
        name="",  # chosen when it is saved
        created=current_time(),
        host=generator.host,
        hyper_model=hyper_model.name,
        settings=request.settings,
        tags={subject.name: subject.tags for subject in subjects},
        originals={subject.name: subject.original.name for subject in subjects if subject.original},
        notes=tuple(subject.note for subject in subjects if subject.note),
        figures=figures,
        measure=PERCEPTUAL if distance else "",
    )
    progress.report("saving the grid", 1.0)
    with alone(run.folder / PICTURES):  # no other process takes the name before it is saved
        record = replace(record, name=free_comparison_name(run))
        save_comparison(run, record, _draw_grid(record, request, subjects, pictures))
    return record


def _subjects(
    run: Run,
    request: CompareRequest,
    generator: ImageGenerator,
    folders: Folders,
    progress: Progress,
) -> tuple[Subject, ...]:
    """Returns every checkpoint once, with its original if that can be drawn."""
    names = dict.fromkeys(find_row(run, name)[0].name for name in request.checkpoints)
    sources = [source_of(run, name) for name in names]
    subjects = []
    originals = locate_sources(sources, folders, progress)
    for checkpoint, original in zip(names, originals, strict=True):
        name = original.source.name
        note = {
            "there": generator.refusal(original.path) if original.state == "there" else "",
            "changed": "it was changed since",
            "missing": "it is missing",
        }[original.state]
        subjects.append(
            Subject(
                name=checkpoint,
                tags=prompt_tags_of(run, checkpoint),
                original=None if note else original.path,
                note=f"{name} is left out: {note}" if note else "",
            )
        )
    return tuple(subjects)


def _draw(
    request: CompareRequest,
    hyper_model: Path,
    subjects: Sequence[Subject],
    generator: ImageGenerator,
    progress: Progress,
) -> dict[PictureKey, Image.Image]:
    plan = plan_pictures(request, hyper_model, subjects)
    pictures: dict[PictureKey, Image.Image] = {}
    parts = progress.split([1.0] * len(plan))
    for number, ((key, picture), part) in enumerate(zip(plan.items(), parts, strict=True), 1):
        phase = f"picture {number} of {len(plan)}: {format_picture(key)}"
        part.report(phase, 0.0)
        pictures[key] = generator.draw(picture, _with_phase(phase, part)).convert("RGB")
    return pictures


def _with_phase(phase: str, progress: Progress) -> Progress:
    """Returns the progress under a fixed name of its phase."""
    return Progress(
        lambda _, fraction: progress.on_progress(phase, fraction),
        progress.should_stop,
        progress.warn,
    )


def _measure(
    pictures: Mapping[PictureKey, Image.Image], request: CompareRequest, distance: Distance | None
) -> list[ComparisonFigures]:
    figures = []
    for name in dict.fromkeys(key.checkpoint for key in pictures if key.checkpoint):
        for prompt, seed in request.settings.bands:
            original = pictures.get(PictureKey("original", name, prompt, seed))
            drawn = {
                row: pictures[key]
                for row, key in _compared_with(name, prompt, seed).items()
                if original is not None and key in pictures
            }
            pixels = {
                row: mean_difference(picture, original)
                for row, picture in drawn.items()
                if original
            }
            perceptual = {
                row: distance(picture, original)
                for row, picture in drawn.items()
                if original and distance
            }
            figures.append(ComparisonFigures(name, prompt, seed, pixels, perceptual))
    return figures


def _compared_with(name: str, prompt: str, seed: int) -> dict[str, PictureKey]:
    """Returns the pictures that are compared with the original's, by row."""
    return {
        "restored": PictureKey("restored", name, prompt, seed),
        "average": PictureKey("average", "", prompt, seed),
    }


def _draw_grid(
    record: ComparisonRecord,
    request: CompareRequest,
    subjects: Sequence[Subject],
    pictures: Mapping[PictureKey, Image.Image],
) -> Image.Image:
    settings = request.settings
    figures = {(pair.checkpoint, pair.prompt, pair.seed): pair for pair in record.figures}
    bands = []
    for prompt, seed in settings.bands:
        rows: dict[str, list[Cell]] = {}
        for subject in subjects:
            column = _cells(request, figures[subject.name, prompt, seed], pictures)
            for name, cell in column.items():
                rows.setdefault(name, []).append(cell)
        bands.append(Band(f"seed {seed}: {prompt}", rows))
    heading = format_heading(record.run, settings)
    names = [subject.name for subject in subjects]
    return draw_grid(heading, names, bands, (settings.width, settings.height))


def _cells(
    request: CompareRequest, figures: ComparisonFigures, pictures: Mapping[PictureKey, Image.Image]
) -> dict[str, Cell]:
    """Returns one column of a band by its rows: the pair first, with its figures below."""
    place = (figures.checkpoint, figures.prompt, figures.seed)
    original = pictures.get(PictureKey("original", *place))
    keys = _compared_with(*place)
    cells = {
        ROW_TITLES["restored"]: Cell(pictures[keys["restored"]]),
        ROW_TITLES["original"]: Cell(original, "not drawn", format_caption(figures, "restored")),
    }
    if request.average:
        cells[ROW_TITLES["average"]] = Cell(
            pictures[keys["average"]], "", format_caption(figures, "average")
        )
    if request.difference:
        for row, key in keys.items():
            if key in pictures:
                drawn = difference_picture(pictures[key], original) if original else None
                cells[DIFFERENCE_TITLES[row]] = Cell(drawn, "no original")
    return cells
