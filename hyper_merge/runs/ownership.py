"""Tells which files belong to a run, for those that remove them: "cannot be read" is no answer then."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import CheckpointError, OutputError
from hyper_merge.loras.metadata import KIND
from hyper_merge.runtime.checked_json import read_json
from hyper_merge.runtime.file_lock import patiently

_INVALID_NAME: Final = 123  # Windows, as for "a?b"; its other bad names are files not found


def private_lora_names(record: Path) -> list[str] | None:
    """Returns the names of a fit's private LoRAs; None for a file that is no record of a fit.

    Raises:
        OutputError: the file is there but cannot be read now.
    """
    try:
        return [str(topup["name"]) for topup in known_json(record)["fit"]["topups"]]
    except (LookupError, TypeError):
        return None


def is_foreign(lora: Path) -> bool:
    """Tells whether a file of this name exists that is not one of our LoRAs.

    Raises:
        OutputError: the file is there but cannot be read now.
    """
    metadata = known_metadata(lora)
    is_ours = metadata.get(KIND) == "lora" and metadata.get("ss_output_name") == lora.stem
    return os.path.lexists(lora) and not is_ours


def known_metadata(path: Path) -> Mapping[str, str]:
    """Returns the metadata of a checkpoint or LoRA; nothing for any other or missing file.

    Raises:
        OutputError: the file is there but cannot be read now.
    """
    try:
        return patiently(lambda: read_header(path)).metadata
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            _require_missing(path, error.__cause__)
        return {}


def known_json(path: Path) -> Any:
    """Returns the plain data of a JSON file; None for any other or missing file.

    Raises:
        OutputError: the file is there but cannot be read now.
    """
    try:
        return patiently(lambda: read_json(path))
    except ValueError:
        return None
    except OSError as error:
        _require_missing(path, error)
        return None


def _require_missing(path: Path, error: OSError) -> None:
    if not _means_missing(error):
        raise OutputError(
            f"{path} cannot be read now ({error.strerror or error}), and what belongs to it would"
            " stay behind",
            hint="nothing was changed: close the programs that use it, and try again",
            file=path,
        ) from error


def _means_missing(error: OSError) -> bool:
    """Tells whether no file is there, be it that none can have the name."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return True
    return error.errno == errno.ENAMETOOLONG or getattr(error, "winerror", None) == _INVALID_NAME
