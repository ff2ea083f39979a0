"""Loads runs whose inputs were LoRAs: they have no hyper-model, and a manifest of another name.

Also lists and loads runs of either kind, for those who treat them alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hyper_merge.checkpoints.architectures.families import family_named, family_title
from hyper_merge.errors import RunError, UnknownRunError
from hyper_merge.loras.prompt_tags import lora_names
from hyper_merge.runs.folders import LORA_MANIFEST, Folders
from hyper_merge.runs.manifest import RunManifest, require_readable_version
from hyper_merge.runs.own_loras import is_own_lora
from hyper_merge.runs.run import PLAIN_NAME, Run, list_runs, load_run, newest_first
from hyper_merge.runtime.checked_json import read_json


def is_lora_run(folders: Folders, name: str) -> bool:
    """Tells whether a run of this name is there whose inputs were LoRAs."""
    return bool(PLAIN_NAME.fullmatch(name)) and (folders.runs / name / LORA_MANIFEST).is_file()


def list_all_runs(folders: Folders) -> tuple[list[Run], list[str]]:
    """Returns runs of checkpoints and of LoRAs, the newest first, and a sentence for each unreadable one."""
    runs, problems = list_runs(folders)
    of_loras, others = list_lora_runs(folders)
    return newest_first([*runs, *of_loras]), [*problems, *others]


def list_lora_runs(folders: Folders) -> tuple[list[Run], list[str]]:
    """Returns runs of LoRAs, the newest first, and a sentence for each unreadable one."""
    results = [_load_or_explain(folders, path.parent.name) for path in folders.lora_manifests()]
    runs = newest_first(run for run in results if isinstance(run, Run))
    return runs, [problem for problem in results if isinstance(problem, str)]


def _load_or_explain(folders: Folders, name: str) -> Run | str:
    try:
        return load_lora_run(folders, name)
    except RunError as error:
        return str(error)


def load_any_run(folders: Folders, name: str) -> Run:
    """Returns a run of either kind.

    Raises:
        RunError: there is no such run, its folder is a link, or its manifest is damaged or of a
            newer version.
    """
    return (load_lora_run if is_lora_run(folders, name) else load_run)(folders, name)


def load_lora_run(folders: Folders, name: str) -> Run:
    """Returns a run whose inputs were LoRAs; its `hyper_model` is no file.

    Raises:
        RunError: there is none of this name, its folder is a link, or its manifest is damaged or of
            a newer version.
    """
    data = read_lora_manifest(folders, name)
    try:
        return _load(folders, name, RunManifest.from_json(data))
    except ValueError as error:
        raise _damaged(folders, name, error) from error


def read_lora_manifest(folders: Folders, name: str) -> dict[str, Any]:
    """Returns the JSON object of a run's manifest, of which only the version is checked.

    Raises:
        RunError: there is no such run, its folder is a link, or its manifest is no JSON object or
            of a newer version.
    """
    if not PLAIN_NAME.fullmatch(name):
        raise UnknownRunError(f"expected the name of a run, which is one of a folder, got {name!r}")
    folder = folders.runs / name
    if folder.is_symlink():
        raise RunError(
            f"the run {name} is a link, and links are not followed", hint="remove the link"
        )
    folders.undo_unfinished(name)
    if not is_lora_run(folders, name):
        raise UnknownRunError(f"there is no run of LoRAs {name!r} in {folders.runs}")
    try:
        return require_readable_version(name, read_json(folder / LORA_MANIFEST))
    except RunError:
        raise
    except (OSError, ValueError) as error:
        raise _damaged(folders, name, error) from error


def _damaged(folders: Folders, name: str, error: Exception) -> RunError:
    return RunError(
        f"the run {name} cannot be read: {folders.runs / name / LORA_MANIFEST} is damaged ({error})",
        hint="copy it back from a backup, or delete that folder and the run's LoRAs by hand",
    )


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
        of_loras=True,
    )
