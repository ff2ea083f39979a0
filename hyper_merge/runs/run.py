"""Loads earlier merges from their manifests, and checks which of their files still exist."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from hyper_merge.checkpoints.architectures.families import family_named, family_title
from hyper_merge.checkpoints.architectures.spec import Family
from hyper_merge.errors import RunError, UnknownRunError
from hyper_merge.loras.prompt_tags import companion_names, format_tag, lora_names
from hyper_merge.recipe.plain_values import unknown_word
from hyper_merge.recipe.recipe import AVERAGE, Recipe
from hyper_merge.runs.folders import LORA_MANIFEST, MANIFEST, Folders, average_id_of
from hyper_merge.runs.manifest import RunManifest, RunSource, require_readable_version
from hyper_merge.runs.own_loras import is_own_lora
from hyper_merge.runs.paths import find_moved, path_exists, same_place
from hyper_merge.runs.report import Report
from hyper_merge.runtime.checked_json import read_json
from hyper_merge.runtime.names import one_line

PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._ +-]{0,200}")
"""What the name of a run looks like, which is one of a folder, and no path."""


@dataclass(frozen=True)
class Run:
    """An earlier merge."""

    name: str
    folder: Path
    created: str  # ISO 8601
    family: str  # its title, "SD 1.x"
    recipe: Recipe
    hyper_model: Path
    loras: tuple[Path, ...]  # shared ones, companions, private ones
    sources: tuple[RunSource, ...]  # a given base first
    report: Report
    missing: tuple[Path, ...]  # of hyper-model and LoRAs: gone since, or replaced by another file
    # SHA-256 of the tensors' bytes, by the LoRA's name; manifests of 0.1 have none.
    hashes: Mapping[str, str] = field(default_factory=dict)
    architecture: Family | None = None  # None for a family that this version does not know
    lost: tuple[str, ...] = ()  # checkpoints without their private LoRA, with shares to match
    of_loras: bool = False  # whether its inputs were LoRAs: then there is no hyper-model

    @property
    def problems(self) -> tuple[str, ...]:
        """One sentence for each file that the prompts name and that is missing or was replaced."""
        return tuple(
            f"the private LoRA of {one_line(row.name)} in the run {self.name} is missing or another"
            f" file, so that {row.fidelity:.2%} of that checkpoint is restored; copy the LoRA back"
            " from a backup, or merge again"
            for row in self.report.checkpoints
            if row.name in self.lost
        )


def list_runs(folders: Folders) -> tuple[list[Run], list[str]]:
    """Returns all runs of checkpoints, the newest first, and a sentence for each that cannot be read.

    Those whose inputs were LoRAs are left out; `lora_runs.list_all_runs` has them too.
    """
    runs: list[Run] = []
    problems: list[str] = []
    for path in folders.manifests():
        name = path.parent.name
        try:
            runs.append(load_run(folders, name))
        except RunError as error:
            problems.append(str(error))
    return newest_first(runs), problems


def newest_first(runs: Iterable[Run]) -> list[Run]:
    """Returns runs by the time of their making, the last one first."""
    return sorted(
        runs, key=lambda run: datetime.fromisoformat(run.created).timestamp(), reverse=True
    )


def load_run(folders: Folders, name: str) -> Run:
    """Returns one run.

    Args:
        folders: where runs are.
        name: of the run, a plain folder name.

    Raises:
        RunError: there is no such run, its folder is a link, or its manifest is damaged or of a
            newer version.
    """
    data = read_manifest(folders, name)
    try:
        return _load(folders, name, RunManifest.from_json(data))
    except ValueError as error:
        raise _damaged(folders, name, str(error)) from error


def read_manifest(folders: Folders, name: str) -> dict[str, Any]:
    """Returns the JSON object of a run's manifest, of which only the version is checked.

    Raises:
        RunError: there is no such run, its folder is a link, or its manifest is no JSON object or
            of a newer version.
    """
    folder = folders.runs / name
    if not PLAIN_NAME.fullmatch(name):
        raise UnknownRunError(f"expected the name of a run, which is one of a folder, got {name!r}")
    if folder.is_symlink() or not same_place(Path(os.path.realpath(folder)).parent, folders.runs):
        raise RunError(
            f"the run {name} is a link to {os.path.realpath(folder)}, and links are not followed",
            hint=f"put the folder itself into {folders.runs}, or remove the link",
        )
    folders.undo_unfinished(name)
    try:
        return require_readable_version(name, read_json(folder / MANIFEST))
    except RunError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise _unknown(folders, name) from None
    except (OSError, ValueError) as error:
        raise _damaged(folders, name, str(error)) from error


def _unknown(folders: Folders, name: str) -> UnknownRunError:
    """Returns the refusal of a run that does not exist, with the runs that do."""
    if (folders.runs / name / LORA_MANIFEST).is_file():
        return UnknownRunError(
            f"the run {name} shares LoRAs, and this goes with runs of checkpoints",
            hint="choose one of those",
        )
    message = f"there is no run {name} in {folders.runs}"
    known = [path.parent.name for path in folders.manifests()]
    if not known:
        return UnknownRunError(message, hint="look at the list of runs")
    return unknown_word(UnknownRunError, message, name, known, "There are")


def _damaged(folders: Folders, name: str, reason: str) -> RunError:
    return RunError(
        f"the run {name} cannot be read: {MANIFEST} in {folders.runs / name} is damaged ({reason})",
        hint="copy it back from a backup, or delete that folder and the run's LoRAs by hand",
    )


def _load(folders: Folders, name: str, manifest: RunManifest) -> Run:
    """Returns the run of a manifest.

    Raises:
        ValueError: the manifest's parts do not go together.
    """
    if manifest.name != name:
        raise ValueError(f"it is that of the run {manifest.name}: was the folder renamed?")
    recipe = _with_moved_files(manifest.to_recipe(output=folders.runs.parent), manifest, folders)
    report = manifest.report
    _require_parts(manifest, recipe)
    hyper_model = folders.find_hyper_model(manifest.hyper_model, manifest.average_id)
    written = (*report.loras, *report.companions, *report.topups)
    loras = tuple(folders.loras / f"{lora}.safetensors" for lora in written)
    missing = _replaced_loras(loras, manifest)
    if not path_exists(hyper_model) or not _is_right(hyper_model, recipe, manifest):
        missing.insert(0, hyper_model)
    present = report.without_topups({p.stem for p in missing}, requested=recipe.topup is not None)
    return Run(
        name=name,
        folder=folders.runs / name,
        created=manifest.created,
        family=family_title(manifest.family),
        recipe=recipe,
        hyper_model=hyper_model,
        loras=loras,
        sources=tuple(
            replace(source, path=_find_moved(source.path, manifest, folders))
            for source in manifest.sources
        ),
        report=present,
        missing=tuple(missing),
        hashes=manifest.hashes,
        architecture=family_named(manifest.family),
        lost=tuple(row.name for row in report.checkpoints if row not in present.checkpoints),
    )


def _with_moved_files(recipe: Recipe, manifest: RunManifest, folders: Folders) -> Recipe:
    """Returns a run's recipe with the checkpoints where they are now if the models folder was moved."""
    models = tuple(_find_moved(path, manifest, folders) for path in recipe.models)
    base = recipe.base
    if base != AVERAGE:
        base = str(_find_moved(Path(base), manifest, folders))
    return replace(recipe, models=models, base=base)


def _find_moved(path: Path, manifest: RunManifest, folders: Folders) -> Path:
    # The hyper-model stood in the folder of checkpoints, whichever that was.
    return find_moved(path, manifest.hyper_model.parent, folders.models)


def _require_parts(manifest: RunManifest, recipe: Recipe) -> None:
    """Returns if report and sources are those of a recipe.

    Raises:
        ValueError: they are not.
    """
    report = manifest.report
    names = lora_names(manifest.name, recipe.ranks)
    # A LoRA of which its companion would hold nothing has none.
    possible = companion_names(names) if recipe.exact != "none" else ()
    companions = tuple(name for name in possible if name in report.companions)
    recorded = (report.loras, report.companions, len(report.checkpoints))
    if recorded != (names, companions, len(recipe.models)):
        raise ValueError("its report is that of another run")
    for topup in report.topups:
        format_tag(topup, 1.0)  # prompts can hold it
    if len(manifest.sources) != len(recipe.models) + (recipe.base != AVERAGE):
        raise ValueError("its sources are those of another run")


def _replaced_loras(loras: tuple[Path, ...], manifest: RunManifest) -> list[Path]:
    """Returns the LoRAs of a run that are gone, or are other files now."""
    hashes = manifest.hashes
    checkpoint_of = {row.topup: row.name for row in manifest.report.checkpoints if row.topup}
    return [
        path
        for path in loras
        if not is_own_lora(path, hashes.get(path.stem), checkpoint_of.get(path.stem))
    ]


def _is_right(hyper_model: Path, recipe: Recipe, manifest: RunManifest) -> bool:
    """Tells whether a hyper-model is still the average that the run is based on."""
    return recipe.base != AVERAGE or average_id_of(hyper_model) == manifest.average_id
