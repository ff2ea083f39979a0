"""Earlier runs, read from their manifests, and deleted with exactly what they wrote."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from hyper_merge import __version__
from hyper_merge.checkpoints.architectures.families import family_named, family_title
from hyper_merge.checkpoints.architectures.spec import Family
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.checkpoints.prediction_type import find_config_file
from hyper_merge.errors import RunError, UnknownRunError
from hyper_merge.loras.cards import CARD_SUFFIXES
from hyper_merge.loras.prompt_tags import companion_names, lora_names
from hyper_merge.recipe.plain_values import unknown_word
from hyper_merge.recipe.recipe import AVERAGE, FIELDS, Recipe
from hyper_merge.runs.folders import (
    FITS,
    MANIFEST,
    PICTURES,
    RUN_FILES,
    Folders,
    average_id_of,
    path_exists,
    same_place,
)
from hyper_merge.runs.own_loras import is_own_lora
from hyper_merge.runs.report import Report
from hyper_merge.runtime.names import one_line

_PLAIN: Final = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._ +-]*")  # a folder's name that leads nowhere


@dataclass(frozen=True)
class RunSource:
    """A checkpoint that went into a run, as it was then."""

    path: Path
    name: str  # of its file
    sha256: str  # of the whole file, 64 hex digits
    legacy_hash: str  # A1111's 8 digits


@dataclass(frozen=True)
class Run:
    """An earlier merge."""

    name: str
    folder: Path
    created: str  # ISO 8601
    family: str  # for people
    recipe: Recipe
    hyper_model: Path
    loras: tuple[Path, ...]
    sources: tuple[RunSource, ...]  # a given base first
    report: Report
    missing: tuple[Path, ...]  # of hyper-model and LoRAs: gone since, or replaced by another file
    # SHA-256 of the tensors' bytes, by the LoRA's name; manifests of 0.1 have none.
    hashes: Mapping[str, str] = field(default_factory=dict)
    architecture: Family | None = None  # None for one that is not known here
    lost: tuple[str, ...] = ()  # checkpoints whose private LoRA is not there; their shares say so

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with the files that its prompts name, in words."""
        return tuple(
            f"the private LoRA of {one_line(row.name)} in the run {self.name} is missing or another"
            f" file, and {row.explained:.2%} of that checkpoint come back; bring the LoRA back from a"
            " copy, or merge again"
            for row in self.report.checkpoints
            if row.name in self.lost
        )


def list_runs(folders: Folders) -> tuple[list[Run], list[str]]:
    """All runs, the newest first, and in words what is wrong with those that cannot be read."""
    runs: list[Run] = []
    problems: list[str] = []
    for path in sorted(folders.runs.glob(f"*/{MANIFEST}")):
        name = path.parent.name
        try:
            runs.append(load_run(folders, name))
        except RunError as error:
            problems.append(str(error))
    runs.sort(key=lambda run: datetime.fromisoformat(run.created).timestamp(), reverse=True)
    return runs, problems


def load_run(folders: Folders, name: str) -> Run:
    """One run.

    Args:
        folders: where runs are.
        name: of the run, a plain folder name.

    Raises:
        RunError: there is no such run, its folder is a link, or its manifest is damaged or of a
            newer version.
    """
    manifest = _manifest(folders, name)
    try:
        return _run(folders, name, manifest)
    except ValueError as error:
        raise _damaged(folders, name, str(error)) from error


def files_of(run: Run, folders: Folders) -> list[Path]:
    """Exactly what `delete_run` would remove, as far as it is there.

    The LoRAs with text and picture of their cards; the hyper-model with its, if Hyper-Merge made it
    for this run and no other run has to do with it; the files of the run's folder. Never a checkpoint that was
    merged, nor a file that somebody else put there.

    Raises:
        RunError: as for `load_run`.
    """
    manifest = _manifest(folders, run.name)
    files = folders.lora_files(path.stem for path in run.loras)
    files += folders.fit_files_of(run.name) + folders.picture_files_of(run.name)
    if _goes_with_its_run(run, manifest, folders):
        beside = [run.hyper_model.with_suffix(suffix) for suffix in CARD_SUFFIXES]
        beside.append(find_config_file(run.hyper_model))
        files += [run.hyper_model, *filter(os.path.lexists, beside)]
    in_folder = [folders.runs / run.name / name for name in RUN_FILES]
    return [*files, *filter(os.path.lexists, in_folder)]


def delete_run(run: Run, folders: Folders) -> list[Path]:
    """Removes a run's files, all of them or none, and its folder if nothing else is in it.

    Returns:
        What was removed.

    Raises:
        RunError: as for `load_run`.
        OutputError: a file cannot be removed; the others are as they were.
    """
    files = files_of(run, folders)
    with FileTransaction() as outputs:
        for path in files:
            outputs.remove(path)
    for name in (FITS, PICTURES, ""):
        with suppress(OSError):  # somebody's notes are in it
            (folders.runs / run.name / name).rmdir()
    return files


def _manifest(folders: Folders, name: str) -> dict[str, Any]:
    folder = folders.runs / name
    if not _PLAIN.fullmatch(name):
        raise UnknownRunError(f"expected the name of a run, which is one of a folder, got {name!r}")
    if folder.is_symlink() or not same_place(Path(os.path.realpath(folder)).parent, folders.runs):
        raise RunError(
            f"the run {name} is a link to {os.path.realpath(folder)}, and links are not followed",
            hint=f"put the folder itself into {folders.runs}, or remove the link",
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise _unknown(folders, name) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folders, name, str(error)) from error
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise _damaged(folders, name, "it says no version")
    if version > MANIFEST_VERSION:
        raise RunError(
            f"the run {name} was made by Hyper-Merge {manifest.get('hyper_merge')}, this is"
            f" {__version__}",
            hint="update Hyper-Merge to open or delete it",
        )
    return dict(manifest)


def _unknown(folders: Folders, name: str) -> UnknownRunError:
    """Returns the refusal of a run that does not exist, with the runs that do."""
    message = f"there is no run {name} in {folders.runs}"
    known = sorted(path.parent.name for path in folders.runs.glob(f"*/{MANIFEST}"))
    if not known:
        return UnknownRunError(message, hint="look at the list of runs")
    return unknown_word(UnknownRunError, message, name, known, "There are")


def _damaged(folders: Folders, name: str, reason: str) -> RunError:
    return RunError(
        f"the run {name} cannot be read: {MANIFEST} in {folders.runs / name} is damaged ({reason})",
        hint="bring it back from a copy, or delete that folder and the run's LoRAs by hand",
    )


def _run(folders: Folders, name: str, manifest: Mapping[str, Any]) -> Run:
    """What a manifest says; ValueError where it says nothing or nonsense."""
    if _text(manifest, "name") != name:
        raise ValueError(f"it is that of the run {manifest['name']}: was the folder renamed?")
    sources = tuple(_source(each) for each in _list(manifest, "sources"))
    recipe = Recipe.from_settings(_settings(folders, manifest, sources), "settings")
    report = Report.from_dict(_mapping(manifest, "report"))
    names = lora_names(name, recipe.ranks)
    companions = companion_names(names) if recipe.exact != "none" else ()
    found = (report.loras, report.companions, len(report.checkpoints))
    if found != (names, companions, len(recipe.models)):
        raise ValueError("its report is that of another run")
    if len(sources) != len(recipe.models) + (recipe.base != AVERAGE):
        raise ValueError("its sources are those of another run")
    hyper_model = folders.hyper_model_of(manifest)
    written = (*names, *companions, *report.topups)
    loras = tuple(folders.loras / f"{lora}.safetensors" for lora in written)
    hashes = _hashes(manifest)
    of = {row.topup: row.name for row in report.checkpoints if row.topup}
    missing = [
        path for path in loras if not is_own_lora(path, hashes.get(path.stem), of.get(path.stem))
    ]
    if not path_exists(hyper_model) or not _is_right(hyper_model, recipe, manifest):
        missing.insert(0, hyper_model)
    rows = report.checkpoints
    report = report.without_topups({p.stem for p in missing}, wished=recipe.topup is not None)
    return Run(
        name=name,
        folder=folders.runs / name,
        created=_time(manifest, "created"),
        family=family_title(_text(manifest, "family")),
        recipe=recipe,
        hyper_model=hyper_model,
        loras=loras,
        sources=sources,
        report=report,
        missing=tuple(missing),
        hashes=hashes,
        architecture=family_named(_text(manifest, "family")),
        lost=tuple(row.name for row in rows if row not in report.checkpoints),
    )


def _hashes(manifest: Mapping[str, Any]) -> Mapping[str, str]:
    found = _mapping(manifest, "files") if "files" in manifest else {}
    return {lora: _text(found, lora) for lora in found}


def _settings(
    folders: Folders, manifest: Mapping[str, Any], sources: tuple[RunSource, ...]
) -> Mapping[str, Any]:
    """The recipe's; manifests of 0.1 have texts without folders, and the paths with the sources."""
    if "settings" in manifest:
        return _mapping(manifest, "settings")
    texts = _mapping(manifest, "recipe")
    settings = {f.name: f.from_text(str(texts[f.name])) for f in FIELDS if f.name in texts}
    paths = [str(source.path) for source in sources]
    based = manifest.get("base_is_first_source") is True
    if texts.get("weights") == "equal":
        settings["weights"] = None
    return {
        **settings,
        "models": paths[based:],
        "base": paths[0] if based and paths else AVERAGE,
        "output": str(folders.runs.parent),
    }


def _is_right(hyper_model: Path, recipe: Recipe, manifest: Mapping[str, Any]) -> bool:
    """Whether a hyper-model is still the average that the run is based on."""
    return recipe.base != AVERAGE or average_id_of(hyper_model) == manifest.get("average_id")


def _goes_with_its_run(run: Run, manifest: Mapping[str, Any], folders: Folders) -> bool:
    """Whether the hyper-model is Hyper-Merge's own and nothing else needs it."""
    path = run.hyper_model
    average_id = average_id_of(path)
    if run.recipe.base != AVERAGE or average_id is None or average_id != manifest.get("average_id"):
        return False
    if not same_place(path.parent, folders.models):
        return False
    if any(same_place(source.path, path) for source in run.sources):
        return False
    readable = {folder.name: other for folder, other in folders.manifests()}
    everyone = {each.parent.name for each in folders.runs.glob(f"*/{MANIFEST}")} - {run.name}
    # A run whose manifest cannot be read may well need it.
    return everyone <= readable.keys() and not any(
        _has_to_do_with(path, readable[other], folders) for other in everyone
    )


def _has_to_do_with(path: Path, manifest: Mapping[str, Any], folders: Folders) -> bool:
    """Whether a run is based on a file, or was made of it."""
    sources = manifest.get("sources")
    listed = sources if isinstance(sources, list) else []
    paths = [Path(str(each.get("path"))) for each in listed if isinstance(each, dict)]
    return any(same_place(path, other) for other in (folders.hyper_model_of(manifest), *paths))


def _source(value: Any) -> RunSource:
    if not isinstance(value, dict):
        raise ValueError("a source is not described")  # noqa: TRY004 - the file is wrong, not a type
    texts = [_text(value, key) for key in ("name", "sha256", "legacy_hash")]
    return RunSource(Path(_text(value, "path")), *texts)


def _time(manifest: Mapping[str, Any], key: str) -> str:
    text = _text(manifest, key)
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError(f"{text} says no time zone")
    return text


def _text(manifest: Mapping[str, Any], key: str) -> str:
    return str(_value(manifest, key, str))


def _list(manifest: Mapping[str, Any], key: str) -> list[Any]:
    return list(_value(manifest, key, list))


def _mapping(manifest: Mapping[str, Any], key: str) -> dict[str, Any]:
    return dict(_value(manifest, key, dict))


def _value(manifest: Mapping[str, Any], key: str, kind: type) -> Any:
    value = manifest.get(key)
    if not isinstance(value, kind):
        raise ValueError(f'"{key}" is missing or of the wrong kind')  # noqa: TRY004 - as above
    return value


MANIFEST_VERSION: Final = 1
