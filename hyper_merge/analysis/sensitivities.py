"""Keeps the sensitivities of an average in the cache, a few hundred numbers in a small file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from hyper_merge.checkpoints.io.shared_text import put_text
from hyper_merge.errors import OutputError
from hyper_merge.runtime.checked_json import read_sealed, require_amounts, sealed
from hyper_merge.runtime.damaged_files import DamagedFiles

SENSITIVITIES: Final = ".sensitivities.json"  # suffix of the file with those of an average

_VERSION: Final = 1  # of the numbers: another network, or other inputs, has another


def sensitivities_path(cache: Path, average_id: str, seed: int) -> Path:
    """Returns the path of the sensitivities of an average, measured with inputs of a seed."""
    return cache / f"{average_id[:32]}-{seed}-{_VERSION}{SENSITIVITIES}"


def read_sensitivities(path: Path, damaged: DamagedFiles | None = None) -> dict[str, float]:
    """Returns sensitivities by module; none where the file is missing or damaged.

    Args:
        path: path of the file.
        damaged: takes a damaged file; None to leave it where it is.
    """
    try:
        return require_amounts(read_sealed(path), "sensitivities")
    except OSError:
        return {}
    except ValueError as error:
        if damaged is not None:
            damaged.take(path, str(error))
        return {}


def write_sensitivities(
    path: Path, sensitivities: Mapping[str, float], warn: Callable[[str], None]
) -> None:
    """Replaces the file; where that fails it only warns: they can be measured again.

    Args:
        path: path of the file.
        sensitivities: by module.
        warn: called with a message if the file cannot be written.
    """
    try:
        put_text(path, sealed(dict(sensitivities)))
    except OutputError as error:
        warn(f"the sensitivities of the layers are not remembered: {error}")
