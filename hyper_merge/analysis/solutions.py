"""Stores the multipliers that were found with earlier settings, as good starts for later ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from hyper_merge.checkpoints.io.shared_text import put_text
from hyper_merge.errors import OutputError
from hyper_merge.runtime.checked_json import read_sealed, sealed
from hyper_merge.runtime.damaged_files import DamagedFiles

Solutions = dict[str, dict[str, list[list[float]]]]
"""Multipliers (d, R) by settings, oldest first, and by group of layers."""

_LARGEST: Final = 1e100  # can be squared and added up; real ones are near 1


def read_solutions(path: Path, dimensions: int, warn: Callable[[str], None]) -> Solutions:
    """Returns all solutions; none where the file is missing or damaged. A damaged one is set aside.

    Args:
        path: path of the file.
        dimensions: number of rows of every matrix of multipliers.
        warn: called with a message for a damaged file.
    """
    try:
        solutions = read_sealed(path)
        _require_solutions(solutions, dimensions)
    except OSError:
        return {}
    except ValueError as error:
        DamagedFiles(warn).take(path, str(error))
        return {}
    return {name: dict(groups) for name, groups in solutions.items()}


def write_solutions(path: Path, solutions: Solutions, warn: Callable[[str], None]) -> None:
    """Replaces the file; where that fails it only warns, since only later starts get worse.

    Args:
        path: path of the file.
        solutions: all solutions.
        warn: called with a message if the file cannot be written.
    """
    try:
        put_text(path, sealed(solutions))
    except OutputError as error:
        warn(f"the multipliers that were found are not remembered: {error}")


def _require_solutions(data: Any, dimensions: int) -> None:
    """Returns if plain data are solutions.

    Raises:
        ValueError: they are not; the message says where.
    """
    if not isinstance(data, Mapping):
        raise ValueError("expected solutions by their settings")  # noqa: TRY004 - the file is wrong
    for name, groups in data.items():
        if not isinstance(groups, Mapping):
            raise ValueError(f"expected groups of layers in {name!r}")  # noqa: TRY004 - as above
        for group, rows in groups.items():
            if not _is_matrix(rows, dimensions):
                raise ValueError(
                    f"expected {dimensions} equal rows of finite numbers in {name!r}, {group!r}"
                )


def _is_matrix(rows: Any, dimensions: int) -> bool:
    if not isinstance(rows, list) or len(rows) != dimensions:
        return False
    if not all(isinstance(row, list) for row in rows) or len({len(row) for row in rows}) != 1:
        return False
    return all(
        type(value) in (int, float) and -_LARGEST <= value <= _LARGEST
        for row in rows
        for value in row
    )
