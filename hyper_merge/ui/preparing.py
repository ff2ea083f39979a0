"""The form held against the files and the folders, and a name where it has none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from hyper_merge.errors import NameTakenError, RecipeError
from hyper_merge.folders import Folders, Place
from hyper_merge.hosts.host import Host
from hyper_merge.preflight import Preflight, examine
from hyper_merge.ui.form import Form, recipe_of

_ENDINGS: Final = ("", "-b", "-c", "-d", "-e", "-f", "-g", "-h")  # tried, one after another


def prepare(host: Host, form: Form) -> tuple[Preflight, Place]:
    """The form, held against the files and the folders.

    Raises:
        HyperMergeError: it cannot be merged like this.
    """
    return placed(examined(host, form), host.folders(), named=is_named(form))


def examined(host: Host, form: Form) -> Preflight:
    """The form, held against the files alone; under the suggested name where it has none.

    Raises:
        HyperMergeError: it cannot be merged like this.
    """
    _require_two(form)
    if not is_named(form):
        form = replace(form, name=suggested_name(form.checkpoints))
    folders = host.folders()
    return examine(recipe_of(form, host.checkpoints(), folders), folders)


def placed(preflight: Preflight, folders: Folders, *, named: bool) -> tuple[Preflight, Place]:
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


def is_named(form: Form) -> bool:
    """Whether the form has a name of its own."""
    return bool((form.name or "").strip())


def suggested_name(picked: Sequence[str]) -> str:
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


def _require_two(form: Form) -> None:
    count = len(form.checkpoints or [])
    if count < 2:
        picked = "one is picked" if count else "none is picked"
        raise RecipeError(f"A merge takes two checkpoints or more; {picked}.")
