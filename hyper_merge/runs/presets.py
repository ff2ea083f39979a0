"""Named settings of a form, kept in one file beside the runs.

One file for all: their names are keys in it, not names of files, so that any two of them can stand side by
side on every system.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from hyper_merge.checkpoints.io.shared_text import put_text
from hyper_merge.errors import OutputError, RunError
from hyper_merge.runtime.checked_json import read_sealed, sealed
from hyper_merge.runtime.file_lock import alone, patiently

PRESETS_FILE: Final = "presets.json"

_LONGEST: Final = 60  # letters of a name
_MOST: Final = 200

Presets = dict[str, Mapping[str, Any]]


def load_presets(folder: Path) -> Presets:
    """Returns the settings by the presets' names; whoever shows them judges the settings.

    Args:
        folder: of the runs.

    Raises:
        RunError: the file is damaged or is none of ours.
        OutputError: the file is there but cannot be read now.
    """
    path = folder / PRESETS_FILE
    try:
        presets = patiently(lambda: read_sealed(path))
        _require_presets(presets)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RunError(
            f"{path} is damaged ({error})", hint="move it away; what is saved then begins a new one"
        ) from error
    except OSError as error:
        raise OutputError(
            f"{path} cannot be read ({error.strerror or error})",
            hint="close the programs that use it, and try again",
            file=path,
        ) from error
    return dict(presets)


def save_preset(folder: Path, name: str, settings: Mapping[str, Any]) -> str:
    """Saves settings under a name, in place of those that had it; returns the name without outer blanks.

    Args:
        folder: of the runs.
        name: one line of text.
        settings: plain data.

    Raises:
        RunError: the name is no name, there are too many presets, or the file is damaged.
        OutputError: the file cannot be written, and stays as it was.
    """
    name = _checked_name(name)
    with alone(folder / PRESETS_FILE):
        presets = load_presets(folder)
        if name not in presets and len(presets) >= _MOST:
            raise RunError(f"there are {_MOST} presets already", hint="delete one of them first")
        put_text(folder / PRESETS_FILE, sealed(presets | {name: settings}))
    return name


def delete_preset(folder: Path, name: str) -> None:
    """Deletes a preset.

    Raises:
        RunError: there is none of that name, or the file is damaged.
        OutputError: the file cannot be written, and stays as it was.
    """
    with alone(folder / PRESETS_FILE):
        presets = load_presets(folder)
        if name not in presets:
            raise RunError(f'there is no preset "{name}" (any more)', hint="choose another one")
        del presets[name]
        put_text(folder / PRESETS_FILE, sealed(presets))


def _checked_name(name: str) -> str:
    name = name.strip()
    if not name:
        raise RunError("the preset has no name yet", hint="enter one")
    if len(name) > _LONGEST or not name.isprintable():
        raise RunError(
            f"expected a name of 1 to {_LONGEST} letters on one line for the preset, got"
            f" {len(name)} letters"
        )
    return name


def _require_presets(data: object) -> None:
    """Returns if plain data are settings by names.

    Raises:
        ValueError: they are not.
    """
    if not isinstance(data, dict) or not all(isinstance(x, dict) for x in data.values()):
        raise ValueError("expected settings by the names of presets")
