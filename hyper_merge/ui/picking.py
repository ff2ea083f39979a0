"""Picking checkpoints, and what a merge of them would take.

Handlers: plain values in, plain values or `gr.update(...)` out, no widgets. The first arguments come
from the wiring (the host, the process's jobs), the rest from the browser. What is refused becomes a
message; it never leaves as an error.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import gradio as gr

from hyper_merge.errors import HyperMergeError, NameTakenError, RecipeError, SameMergeError
from hyper_merge.folders import Folders, Place, average_id_of
from hyper_merge.hosts.host import Host
from hyper_merge.inspection import Row, look_at
from hyper_merge.preflight import Preflight, examine
from hyper_merge.ui import views
from hyper_merge.ui.form import BASE_AVERAGE, PRESETS, Form, recipe_of

ALL_FOLDERS: Final = "all folders"
TOP_FOLDER: Final = "without a folder"

_SUGGESTIONS: Final = 9  # tried, one after another


def listing(host: Host, picked: Sequence[str]) -> tuple[Any, Any, Any, Any]:
    """Choices of checkpoints, folders and bases from the host's list, and the demo's button.

    Checkpoints that are gone stay picked: the table says so.
    """
    names = list(host.checkpoints())
    gone = [name for name in picked or [] if name not in names]
    folders = folders_in(names)
    return (
        gr.update(choices=[*names, *gone]),
        gr.update(choices=folders, value=folders[0]),
        gr.update(choices=[BASE_AVERAGE, *names]),
        gr.update(visible=offers_demo(host)),
    )


def folders_in(names: Sequence[str]) -> list[str]:
    """What can be added at once: all, those in no folder, and every folder."""
    folders = sorted({_folder(name) for name in names} - {""})
    if not folders:
        return [ALL_FOLDERS]
    top = [TOP_FOLDER] if any(not _folder(name) for name in names) else []
    return [ALL_FOLDERS, *top, *folders]


def add_folder(host: Host, picked: Sequence[str], folder: str) -> list[str]:
    """The picked checkpoints and those of a folder, less the hyper-models that we made."""
    wanted = "" if folder == TOP_FOLDER else folder
    new = [
        name
        for name, path in host.checkpoints().items()
        if (folder == ALL_FOLDERS or _folder(name) == wanted) and average_id_of(path) is None
    ]
    return list(dict.fromkeys([*(picked or []), *new]))


def none_picked() -> list[str]:
    """An empty selection."""
    return []


def preset(word: str) -> str:
    """The ranks of one of the form's presets."""
    return PRESETS[word]


def offers_demo(host: Host) -> bool:
    """Whether there is nothing to merge, and a place to make something in."""
    return not host.has_txt2img and not host.checkpoints()


def plan(host: Host, *values: Any) -> tuple[str, str, Any]:
    """The picked checkpoints' table, what a merge takes or why it cannot be, an empty name's hint."""
    form = Form(*values)
    listed = host.checkpoints()
    rows = [(name, _row(name, listed)) for name in form.checkpoints or []]
    hashes = {name: host.known_hash(name) for name, _ in rows}
    said = _plan(host, form, [row for _, row in rows])
    name = suggested_name(form.checkpoints) if rows else ""
    return views.checkpoints(rows, hashes), said, gr.update(placeholder=name)


def prepare(host: Host, form: Form) -> tuple[Preflight, Place]:
    """The form, held against the files and the folders.

    Raises:
        HyperMergeError: it cannot be merged like this.
    """
    _require_two(form)
    folders, listed = host.folders(), host.checkpoints()
    if (form.name or "").strip():
        return _prepared(form, listed, folders)
    suggestion = suggested_name(form.checkpoints)
    for number in range(1, _SUGGESTIONS):
        name = suggestion if number == 1 else f"{suggestion}-{chr(ord('a') + number - 1)}"
        try:
            return _prepared(replace(form, name=name), listed, folders)
        except NameTakenError:
            continue
    return _prepared(replace(form, name=suggestion), listed, folders)


def suggested_name(picked: Sequence[str]) -> str:
    """A name for a merge of these checkpoints that prompts and file systems can hold.

    >>> suggested_name(["sd15/portrait v2.safetensors", "b.ckpt"])
    'hyper-portrait-v2-2'
    """
    stem = Path(picked[0].replace("\\", "/")).stem if picked else "model"
    plain = re.sub(r"[^A-Za-z0-9]+", "-", stem)[:24].strip("-") or "model"
    return f"hyper-{plain}-{len(picked)}"


def _prepared(form: Form, listed: Mapping[str, Path], folders: Folders) -> tuple[Preflight, Place]:
    preflight = examine(recipe_of(form, listed, folders), folders)
    place = folders.place(preflight.recipe, preflight.average_id)
    preflight.require_room(place)
    return preflight, place


def _require_two(form: Form) -> None:
    count = len(form.checkpoints or [])
    if count < 2:
        picked = "one is picked" if count else "none is picked"
        raise RecipeError(f"A merge takes two checkpoints or more; {picked}.")


def _plan(host: Host, form: Form, rows: Sequence[Row]) -> str:
    if len(rows) < 2:
        return views.message("info", "Pick one more checkpoint.") if rows else ""
    if any(row.problem for row in rows):
        return views.message("bad", "Not all of these can be merged; the table says why.")
    try:
        preflight, place = prepare(host, form)
    except SameMergeError as error:
        return views.message("info", str(error))
    except HyperMergeError as error:
        return views.message("bad", str(error))
    return views.plan(preflight, place)


def _row(name: str, listed: Mapping[str, Path]) -> Row:
    if name not in listed:
        return _absent(name, "no longer in the list; press Refresh")
    path = listed[name]
    try:
        status = path.stat()
    except FileNotFoundError:
        return _absent(name, "no longer there; press Refresh")
    except OSError:
        return look_at(path)
    return _looked_at(path, status.st_size, status.st_mtime_ns)


def _absent(name: str, problem: str) -> Row:
    return Row(name, Path(name), None, 0, "", "", None, problem)


@functools.lru_cache(maxsize=256)
def _looked_at(path: Path, _size: int, _changed: int) -> Row:
    """A look at a file, which is not repeated while the file stays the same."""
    return look_at(path)


def _folder(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[0]
