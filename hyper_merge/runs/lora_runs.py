"""Loads runs whose inputs were LoRAs: they have no hyper-model, and a manifest of another name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from hyper_merge.checkpoints.architectures.families import family_named, family_title
from hyper_merge.errors import RunError
from hyper_merge.loras.prompt_tags import lora_names
from hyper_merge.runs.folders import LORA_MANIFEST, Folders
from hyper_merge.runs.manifest import RunManifest, require_readable_version
from hyper_merge.runs.own_loras import is_own_lora
from hyper_merge.runs.run import Run
from hyper_merge.runtime.checked_json import read_json

_PLAIN: Final = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._ +-]{0,200}")  # a folder's name, no path


def is_lora_run(folders: Folders, name: str) -> bool:
    """Tells whether a run of this name is there whose inputs were LoRAs."""
    return bool(_PLAIN.fullmatch(name)) and (folders.runs / name / LORA_MANIFEST).is_file()


def load_lora_run(folders: Folders, name: str) -> Run:
    """Returns a run whose inputs were LoRAs; its `hyper_model` is no file.

    Raises:
        RunError: its folder is a link, or its manifest is damaged or of a newer version.
    """
    folder = folders.runs / name
    if folder.is_symlink():
        raise RunError(
            f"the run {name} is a link, and links are not followed", hint="remove the link"
        )
    folders.undo_unfinished(name)
    try:
        data = require_readable_version(name, read_json(folder / LORA_MANIFEST))
        return _load(folders, name, RunManifest.from_json(data))
    except (OSError, ValueError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(
            f"the run {name} cannot be read: {folder / LORA_MANIFEST} is damaged ({error})",
            hint="copy it back from a backup, or delete that folder and the run's LoRAs by hand",
        ) from error


def _load(folders: Folders, name: str, manifest: RunManifest) -> Run:
    recipe = manifest.to_recipe(output=folders.runs.parent)
    report = manifest.report
    if manifest.name != name or report.loras != lora_names(name, recipe.ranks):
        raise ValueError("it is that of another run")
    written = (*report.loras, *report.topups)
    paths = tuple(folders.loras / f"{lora}.safetensors" for lora in written)
    owners = {row.topup: row.name for row in report.checkpoints if row.topup}
    missing = [
        path
        for path in paths
        if not is_own_lora(path, manifest.hashes.get(path.stem), owners.get(path.stem))
    ]
    return Run(
        name=name,
        folder=folders.runs / name,
        created=manifest.created,
        family=family_title(manifest.family),
        recipe=recipe,
        hyper_model=Path(),
        loras=paths,
        sources=manifest.sources,
        report=report,
        missing=tuple(missing),
        hashes=manifest.hashes,
        architecture=family_named(manifest.family),
    )
