"""Deletes a run with exactly the files that it wrote."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.checkpoints.prediction_type import find_config_file
from hyper_merge.loras.cards import CARD_SUFFIXES
from hyper_merge.recipe.recipe import AVERAGE
from hyper_merge.runs.folders import AVERAGE_ID, FITS, PICTURES, RUN_FILES, Folders
from hyper_merge.runs.lora_runs import read_lora_manifest
from hyper_merge.runs.manifest import RunOutline
from hyper_merge.runs.name_locks import Hold, held
from hyper_merge.runs.ownership import known_metadata
from hyper_merge.runs.paths import find_moved, same_place
from hyper_merge.runs.run import Run, read_manifest


def files_of(run: Run, folders: Folders) -> list[Path]:
    """Returns the existing files that `delete_run` would remove, exactly.

    These are the LoRAs with text and picture of their cards, but none that another run has or was
    made of; the hyper-model with its card, if Hyper-Merge made it for this run and no other run needs
    it; the files of the run's folder. A checkpoint or LoRA that the run was made of is never among
    them, nor a file that somebody else put there.

    Raises:
        RunError: there is no such run, or its manifest is damaged or of a newer version.
    """
    read = read_lora_manifest if run.of_loras else read_manifest
    outline = RunOutline.from_json(run.folder, read(folders, run.name))
    loras = folders.lora_files([path.stem for path in run.loras]) + folders.fit_files_of(run.name)
    files = [*_unneeded(loras, run, folders), *folders.picture_files_of(run.name)]
    if not run.of_loras and _goes_with_its_run(run, outline, folders):
        companions = [run.hyper_model.with_suffix(suffix) for suffix in CARD_SUFFIXES]
        companions.append(find_config_file(run.hyper_model))
        files += [run.hyper_model, *filter(os.path.lexists, companions)]
    in_folder = [folders.runs / run.name / name for name in RUN_FILES]
    return [*files, *filter(os.path.lexists, in_folder)]


def delete_run(run: Run, folders: Folders) -> list[Path]:
    """Removes a run's files, all of them or none, and its folder if nothing else is in it.

    Returns:
        The removed files.

    Raises:
        RunError: there is no such run, or its manifest is damaged or of a newer version.
        OutputError: a file cannot be read or removed, the others are as they were; or a running
            job needs the run or its hyper-model.
    """
    with held(folders.runs, Hold("run", run.name)):
        files = files_of(run, folders)
        model = [Hold("model", run.hyper_model.name)] if run.hyper_model in files else []
        with held(folders.runs, *model), FileTransaction() as outputs:
            for path in files:
                outputs.remove(path)
    for name in (FITS, PICTURES, ""):
        with suppress(OSError):  # the user has put files there
            (folders.runs / run.name / name).rmdir()
    return files


def _unneeded(files: list[Path], run: Run, folders: Folders) -> list[Path]:
    """Returns the files of a run's LoRAs and fits without LoRAs, and their cards, that others need."""
    needed = folders.needed_loras(run.name)
    loras = {path: path.with_suffix(".safetensors") for path in files}
    kept = {x for x in set(loras.values()) if any(same_place(x, other) for other in needed)}
    return [path for path in files if loras[path] not in kept]


def _goes_with_its_run(run: Run, outline: RunOutline, folders: Folders) -> bool:
    """Tells whether the hyper-model is Hyper-Merge's own and nothing else needs it."""
    path = run.hyper_model
    average_id = known_metadata(path).get(AVERAGE_ID)
    if run.recipe.base != AVERAGE or average_id is None or average_id != outline.average_id:
        return False
    if not same_place(path.parent, folders.models):
        return False
    if any(same_place(source.path, path) for source in run.sources):
        return False
    readable = {other.name: other for other in folders.outlines()}
    names = {other.parent.name for other in folders.manifests()} - {run.name}
    # A run whose manifest cannot be read might need it.
    return names <= readable.keys() and not any(
        _needs(readable[name], path, folders) for name in names
    )


def _needs(outline: RunOutline, path: Path, folders: Folders) -> bool:
    """Tells whether a run is based on a file, or was made of it."""
    before = outline.hyper_model.parent  # if the models folder was moved since
    sources = [find_moved(path, before, folders.models) for path in outline.source_paths]
    paths = (folders.hyper_model_of(outline), *sources)
    return any(same_place(path, other) for other in paths)
