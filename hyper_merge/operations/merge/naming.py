"""Chooses names for merges that the user did not name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from hyper_merge.errors import NameTakenError
from hyper_merge.operations.merge.estimate import require_room
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.runs.folders import Place

_ENDINGS: Final = ("", "-b", "-c", "-d", "-e", "-f", "-g", "-h")  # tried one after another


def with_free_name(preflight: Preflight, *, named: bool) -> tuple[Preflight, Place]:
    """Finds a place for a merge's files, under another name where the suggested one is taken.

    Args:
        preflight: the validated recipe.
        named: whether the user chose the name, which is then kept.

    Returns:
        The preflight with the name, and the place.

    Raises:
        OutputError: the name is taken, or the disk has too little room.
    """
    if not named:
        for ending in _ENDINGS:
            recipe = replace(preflight.recipe, name=preflight.recipe.name + ending)
            try:
                return _with_place(replace(preflight, recipe=recipe))
            except NameTakenError:
                continue
    return _with_place(preflight)


def suggest_name(checkpoints: Sequence[str]) -> str:
    """Returns a name for a merge of checkpoints that prompts and file systems can hold.

    >>> suggest_name(["sd15/portrait v2.safetensors", "b.ckpt"])
    'hyper-portrait-v2-2'
    """
    stem = Path(checkpoints[0].replace("\\", "/")).stem if checkpoints else "model"
    plain = re.sub(r"[^A-Za-z0-9]+", "-", stem)[:24].strip("-") or "model"
    return f"hyper-{plain}-{len(checkpoints)}"


def _with_place(preflight: Preflight) -> tuple[Preflight, Place]:
    place = preflight.find_place()
    require_room(preflight, place)
    return preflight, place
