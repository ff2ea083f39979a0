"""Names for merges that were given none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from hyper_merge.errors import NameTakenError
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.runs.folders import Folders, Place

_ENDINGS: Final = ("", "-b", "-c", "-d", "-e", "-f", "-g", "-h")  # tried, one after another


def with_free_name(
    preflight: Preflight, folders: Folders, *, named: bool
) -> tuple[Preflight, Place]:
    """With a place for its files; a name that is taken leads to another unless it was given.

    Raises:
        OutputError: the name is taken, or the disk has too little room.
    """
    if named:
        return _in_place(preflight, folders)
    recipe = preflight.recipe
    for end in _ENDINGS:
        other = replace(recipe, name=recipe.name + end)
        try:
            return _in_place(replace(preflight, recipe=other), folders)
        except NameTakenError:
            continue
    return _in_place(preflight, folders)


def suggest_name(picked: Sequence[str]) -> str:
    """A name for a merge of these checkpoints that prompts and file systems can hold.

    >>> suggested_name(["sd15/portrait v2.safetensors", "b.ckpt"])
    'hyper-portrait-v2-2'
    """
    stem = Path(picked[0].replace("\\", "/")).stem if picked else "model"
    plain = re.sub(r"[^A-Za-z0-9]+", "-", stem)[:24].strip("-") or "model"
    return f"hyper-{plain}-{len(picked)}"


def _in_place(preflight: Preflight, folders: Folders) -> tuple[Preflight, Place]:
    place = folders.place(preflight.recipe, preflight.average_id)
    preflight.require_room(place)
    return preflight, place
