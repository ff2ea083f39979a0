"""Saves and loads comparisons: the grid as a PNG with its parameters, and all figures as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hyper_merge import __version__
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.errors import RunError
from hyper_merge.operations.compare.request import PictureSettings, infotext
from hyper_merge.runs.folders import PICTURES
from hyper_merge.runs.plain_data import read_plain
from hyper_merge.runs.run import Run
from hyper_merge.runtime.checked_json import read_json

COMPARISON_VERSION: Final = 1

_NAME: Final = re.compile(r"comparison-(\d{1,9})")


@dataclass(frozen=True)
class ComparisonFigures:
    """The distances between the pictures of a pair.

    Attributes:
        checkpoint: As the run calls it.
        prompt: Without tags.
        seed: Of the pair.
        pixels: Mean absolute difference to the original's picture, 0..255, by what was drawn:
            "restored" or "average"; empty where there is no original.
        perceptual: LPIPS distances by what was drawn, where the host can measure them.
    """

    checkpoint: str
    prompt: str
    seed: int
    pixels: Mapping[str, float]
    perceptual: Mapping[str, float]


@dataclass(frozen=True)
class ComparisonRecord:
    """A comparison that was made.

    Attributes:
        run: Its name.
        name: Of the comparison within the run, "comparison-1".
        created: ISO 8601.
        host: What drew the pictures.
        hyper_model: Name of its file.
        settings: Of all pictures.
        tags: The tags added to the prompts, by checkpoint.
        originals: Names of files, by checkpoint, as far as they were drawn.
        notes: One sentence for each original that was left out.
        figures: Of every pair.
        measure: Name of the second figure; empty where there is none.
    """

    run: str
    name: str
    created: str
    host: str
    hyper_model: str
    settings: PictureSettings
    tags: Mapping[str, str]
    originals: Mapping[str, str]
    notes: tuple[str, ...]
    figures: tuple[ComparisonFigures, ...]
    measure: str = ""


def comparison_names(run: Run) -> list[str]:
    """Returns the names of a run's comparisons, the newest first."""
    folder = run.folder / PICTURES
    stems = [path.stem for path in ([] if folder.is_symlink() else folder.glob("*.json"))]
    return sorted(filter(_NAME.fullmatch, stems), key=_number, reverse=True)


def free_comparison_name(run: Run) -> str:
    """Returns a name for a comparison that no file of the run has."""
    taken = [path.stem for path in (run.folder / PICTURES).glob("*")]
    numbers = [_number(name) for name in taken if _NAME.fullmatch(name)]
    return f"comparison-{max(numbers, default=0) + 1}"


def comparison_paths(run: Run, name: str) -> tuple[Path, Path]:
    """Returns where grid and figures of a comparison belong.

    Raises:
        RunError: that is no name of a comparison.
    """
    if not _NAME.fullmatch(name):
        raise RunError(f"expected the name of a comparison, such as comparison-1, got {name!r}")
    stem = run.folder / PICTURES / name
    return stem.with_suffix(".png"), stem.with_suffix(".json")


def save_comparison(run: Run, record: ComparisonRecord, grid: Image.Image) -> Path:
    """Writes both files, or none; nothing that exists is replaced.

    Returns:
        The path of the grid.

    Raises:
        OutputError: the place is taken or cannot be written.
    """
    picture, figures = comparison_paths(run, record.name)
    data = {"version": COMPARISON_VERSION, "hyper_merge": __version__, **asdict(record)}
    facts = json.dumps(data, ensure_ascii=False)
    models = {"Hyper-model": record.hyper_model, "Hyper-Merge": __version__}
    text = PngInfo()
    text.add_itxt("parameters", infotext(record.settings, models))
    text.add_itxt("hyper_merge.comparison", facts)
    stream = BytesIO()
    grid.save(stream, "PNG", pnginfo=text)
    with FileTransaction() as outputs:
        outputs.bytes(picture, stream.getvalue())
        outputs.text(figures, json.dumps(data, ensure_ascii=False, indent=1) + "\n")
    return picture


def load_comparison(run: Run, name: str) -> ComparisonRecord:
    """Returns the figures of a comparison.

    Raises:
        RunError: there is none of that name, or its file is damaged.
    """
    _, path = comparison_paths(run, name)
    try:
        data = read_json(path)
        version = data.pop("version") if isinstance(data, dict) else None
        known = data if version == COMPARISON_VERSION else {}
        record: ComparisonRecord = read_plain(ComparisonRecord, known, "comparison")
    except FileNotFoundError:
        raise RunError(
            f"there is no {name} of the run {run.name}", hint="reload the list"
        ) from None
    except (OSError, ValueError, LookupError) as error:
        raise RunError(
            f"{name} of the run {run.name} cannot be read: {path} is damaged ({error})",
            hint="compare again",
        ) from error
    return record


def _number(name: str) -> int:
    return int(name.partition("-")[2])
