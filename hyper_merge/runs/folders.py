"""Describes the folders of a host: where files go, which exist already, which names are free."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hyper_merge.checkpoints.io.leftovers import remove_leftovers
from hyper_merge.checkpoints.io.temporary_names import JOURNALS, owner_of
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import (
    CheckpointError,
    NameTakenError,
    OutputError,
    SameMergeError,
)
from hyper_merge.loras.cards import CARD_SUFFIXES
from hyper_merge.recipe.recipe import AVERAGE, Recipe
from hyper_merge.runs.manifest import RunOutline
from hyper_merge.runs.name_locks import remove_unheld_names
from hyper_merge.runs.ownership import is_foreign, known_json, private_lora_names
from hyper_merge.runs.paths import path_exists, same_place
from hyper_merge.runtime.formatting import GB
from hyper_merge.runtime.names import file_stem, name_key, unique_name

SIZE_LIMIT: Final = 20 * GB  # bytes of all analyses; the least recently used go first
AVERAGE_ID: Final = "hyper_merge.average_id"
"""Metadata of a hyper-model: equal for the same average of the same files."""

MANIFEST: Final = "manifest.json"
LORA_MANIFEST: Final = "loras.json"
"""The manifest of a run whose inputs were LoRAs: it has no hyper-model, which other commands need."""

MULTIPLIERS: Final = "multipliers.txt"
REPORT: Final = "report.txt"
FITS: Final = "fits"
"""Folder within a run's: a record and a text for each checkpoint that was fitted later."""

PICTURES: Final = "pictures"
"""Folder within a run's: a grid and its figures for each comparison with the originals."""

RUN_FILES: Final = (MULTIPLIERS, REPORT, MANIFEST, LORA_MANIFEST)  # of a run's folder


@dataclass(frozen=True)
class Place:
    """The paths of one run's files."""

    run: str  # name of the run and first part of its LoRAs' names
    hyper_model: Path  # to be used with the LoRAs
    exists: bool  # the hyper-model is there already, and the right one
    loras: Path  # folder of the LoRAs
    folder: Path  # of manifest, multipliers and report

    def size_of_hyper_model(self, estimate: int) -> int:
        """Returns the bytes of the hyper-model, or the estimate where it is not there (any more)."""
        with suppress(FileNotFoundError):  # it may have been deleted just now
            return self.hyper_model.stat().st_size if self.exists else estimate
        return estimate


@dataclass(frozen=True)
class Folders:
    """The folders that all files go to; none of them need exist yet."""

    models: Path  # hyper-models
    loras: Path
    runs: Path  # a folder per run, with manifest, multipliers and report
    cache: Path  # analyses and hashes
    cache_limit: int = SIZE_LIMIT  # bytes of all analyses

    @classmethod
    def under(cls, root: Path) -> Folders:
        """Returns the folders within a models folder that is laid out like a WebUI's."""
        runs = root / "hyper-merge"
        return cls(root / "Stable-diffusion", root / "Lora", runs, runs / "cache")

    def place(self, recipe: Recipe, average_id: str) -> Place:
        """Returns where a recipe's files go.

        A hyper-model of the same checkpoints is used again; another list of ranks then makes a
        separate run, `<name>-2`, since hosts cache LoRAs by path.

        Raises:
            OutputError: the name is taken by something else, by the same merge, or by a hyper-model
                that other runs need.
        """
        existing = self.hyper_model_for(recipe, average_id)
        new = self.models / f"{recipe.name}.safetensors"
        if existing is None:
            require_no_source(new, recipe.models)
            if new.exists() and not recipe.overwrite:
                raise NameTakenError(
                    f"{new} exists and is not the average of these checkpoints",
                    hint="choose another name, or --overwrite on the command line",
                )
            self.require_unused(new, average_id, replaced=recipe.name if recipe.overwrite else None)
        if recipe.overwrite:
            self.require_same_case(recipe.name)
            self._require_no_lora_run(recipe.name)
        run = recipe.name if recipe.overwrite else self._free_run(recipe, average_id)
        return Place(
            run=run,
            hyper_model=existing or new,
            exists=existing is not None,
            loras=self.loras,
            folder=self.runs / run,
        )

    def outlines(self) -> Iterator[RunOutline]:
        """Yields the outline of every run's manifest; unreadable ones are skipped."""
        outlines = map(RunOutline.read, self.manifests())
        return (outline for outline in outlines if outline is not None)

    def manifests(self) -> list[Path]:
        """Returns the paths of all runs' manifests, by the runs' names."""
        self.undo_unfinished()
        remove_unheld_names(self.runs)
        return sorted(self.runs.glob(f"*/{MANIFEST}"))

    def lora_manifests(self) -> list[Path]:
        """Returns the paths of the manifests of all runs whose inputs were LoRAs, by the runs' names."""
        return sorted(self.runs.glob(f"*/{LORA_MANIFEST}"))

    def undo_unfinished(self, run: str = "*") -> None:
        """Undoes what a killed process has begun to change in a run, or in all, so that runs are whole."""
        for folder in self.runs.glob(run):
            for part in ("", FITS, PICTURES):
                for journal in _journals(folder / part):
                    remove_leftovers(journal.parent)

    def hyper_model_of(self, outline: RunOutline) -> Path:
        """Returns the file that a run's LoRAs are added to, even after all files were moved."""
        return self.find_hyper_model(outline.hyper_model, outline.average_id)

    def find_hyper_model(self, recorded: Path, average_id: str | None) -> Path:
        """Returns where a hyper-model is now.

        Args:
            recorded: where it was.
            average_id: of the average that it holds; None where that is not known.
        """
        here = self.models / recorded.name
        is_here = average_id_of(here) == average_id or not path_exists(recorded)
        return here if is_here else recorded

    def require_unused(self, path: Path, average_id: str, replaced: str | None = None) -> None:
        """Returns if no run needs another hyper-model than this average in a place.

        Args:
            path: where the average is to be written.
            average_id: of that average.
            replaced: name of a run that will be replaced too.

        Raises:
            OutputError: some do; it names them.
        """
        users = [
            run.name
            for run in self.outlines()
            if run.name != replaced
            and run.average_id != average_id
            and same_place(self.hyper_model_of(run), path)
        ]
        if users:
            noun = "run" if len(users) == 1 else "runs"
            raise NameTakenError(
                f"{path.name} is the hyper-model of the {noun} {', '.join(users)}, and their"
                " LoRAs go with no other",
                hint=f"choose another name, or delete the {noun} first",
            )

    def lora_files(self, names: Iterable[str]) -> list[Path]:
        """Returns the existing files of LoRAs, with their cards and pictures.

        A LoRA of that name which Hyper-Merge did not write is left out with its card and picture.

        Raises:
            OutputError: a LoRA is there but cannot be read now.
        """
        return [
            path
            for name in names
            if not is_foreign(self.loras / f"{name}.safetensors")
            for path in (
                self.loras / f"{name}{suffix}" for suffix in (".safetensors", *CARD_SUFFIXES)
            )
            if os.path.lexists(path)
        ]

    def lora_files_of(self, run: str) -> list[Path]:
        """Returns the files of a run's LoRAs by its manifest; none where that is damaged.

        Raises:
            OutputError: the manifest or a LoRA is there but cannot be read now.
        """
        manifest = known_json(self.runs / run / MANIFEST)
        if manifest is None:
            manifest = known_json(self.runs / run / LORA_MANIFEST)
        listed = (
            RunOutline.from_json(self.runs / run, manifest).loras
            if isinstance(manifest, dict)
            else ()
        )
        pattern = re.compile(re.escape(run) + r"_(\d+-\d+(-exact)?|top-[^/\\]+)")  # nothing else
        return self.lora_files(name for name in listed if pattern.fullmatch(name))

    def fit_files_of(self, run: str, name: str | None = None) -> list[Path]:
        """Returns the files of a run's fits, or of one: records, texts, and private LoRAs.

        Raises:
            OutputError: a record or a LoRA is there but cannot be read now.
        """
        folder = self.runs / run / FITS
        pattern = re.compile(re.escape(run) + r"_fit-[^/\\]+")  # nothing that leads elsewhere
        files: list[Path] = []
        for path in () if folder.is_symlink() else sorted(folder.glob("*.json")):
            names = private_lora_names(path)
            if names is not None and (name is None or path.stem in (name, file_stem(name))):
                text = path.with_name(path.stem + ".txt")
                files += [path, *([text] if os.path.lexists(text) else [])]
                files += self.lora_files(lora for lora in names if pattern.fullmatch(lora))
        return files

    def picture_files_of(self, run: str) -> list[Path]:
        """Returns grids and figures of a run's comparisons, and no files of other origin."""
        folder = self.runs / run / PICTURES
        paths = [] if folder.is_symlink() else sorted(folder.glob("comparison-*"))
        pattern = re.compile(r"comparison-\d+\.(png|json)")
        return [path for path in paths if pattern.fullmatch(path.name)]

    def is_used(self, run: str) -> bool:
        """Tells whether there is anything in a run's folder but what a killed process has left."""
        return _is_used(self.runs / run)

    def needed_loras(self, run: str) -> list[Path]:
        """Returns LoRAs that must outlive a run: those of other runs, and those that any was made of.

        An input that is no longer where it was counts as one of its name among the LoRAs here.
        """
        outlines = [*self.outlines(), *self.outlines_of_loras()]
        names = [name for other in outlines if other.name != run for name in other.loras]
        inputs = [path for other in self.outlines_of_loras() for path in other.source_paths]
        moved = [self.loras / path.name for path in inputs if not path_exists(path)]
        return [*(self.loras / f"{name}.safetensors" for name in names), *inputs, *moved]

    def lora_owners(self) -> dict[str, str]:
        """Returns the run of every LoRA, whether its file exists or not, by the LoRA's `name_key`."""
        return {
            name_key(lora): run.name
            for run in (*self.outlines(), *self.outlines_of_loras())
            for lora in (*run.loras, *self.fitted_names(run.name))
        }

    def outlines_of_loras(self) -> list[RunOutline]:
        """Returns the outline of every run whose inputs were LoRAs; unreadable ones are skipped."""
        outlines = map(RunOutline.read, self.lora_manifests())
        return [outline for outline in outlines if outline is not None]

    def fitted_names(self, run: str, but: str = "") -> list[str]:
        """Returns the names of the private LoRAs of a run's fits, except those of one fit.

        Records that cannot be read are skipped.
        """
        folder = self.runs / run / FITS
        records = () if folder.is_symlink() else sorted(folder.glob("*.json"))
        others = (path for path in records if path.stem not in (but, file_stem(but)))
        names: list[str] = []
        for path in others:
            with suppress(OutputError):
                names += private_lora_names(path) or ()
        return names

    def hyper_model_for(self, recipe: Recipe, average_id: str) -> Path | None:
        """Returns an existing file that a recipe's LoRAs can be added to; None if there is none."""
        if recipe.base != AVERAGE:
            return Path(recipe.base)
        candidates = [self.models / f"{recipe.name}.safetensors"]
        candidates += [
            self.models / run.hyper_model.name
            for run in self.outlines()
            if run.average_id == average_id
        ]
        return next((path for path in candidates if average_id_of(path) == average_id), None)

    def _require_no_lora_run(self, run: str) -> None:
        """Returns if no run of LoRAs has this name, which a merge would leave half there.

        Raises:
            OutputError: one has.
        """
        if (self.runs / run / LORA_MANIFEST).exists():
            raise NameTakenError(
                f"{run} is a run of LoRAs", hint="choose another name, or delete that run first"
            )

    def require_same_case(self, run: str) -> None:
        """Returns if no run has this name in other letters of case.

        Raises:
            OutputError: one has.
        """
        for other in (*self.outlines(), *self.outlines_of_loras()):
            if other.name != run and name_key(other.name) == name_key(run):
                raise NameTakenError(
                    f"the run {other.name} exists, and its name differs from {run} by case alone",
                    hint=f"write {other.name} to replace it, or choose another name",
                )

    def _free_run(self, recipe: Recipe, average_id: str) -> str:
        """Returns the recipe's name, or the first of name-2, name-3, ... that no other run has.

        Raises:
            OutputError: a run with this very recipe exists already.
        """
        request = _deciding(recipe.to_metadata()), average_id
        taken = {
            name_key(run.name): (_deciding(run.recipe), run.average_id)
            for run in (*self.outlines_of_loras(), *self.outlines())
        }

        def is_taken(run: str) -> bool:
            if taken.get(name_key(run)) == request:
                raise SameMergeError(
                    f"the run {run} is this very merge already",
                    hint="choose another name or other ranks",
                    run=run,
                )
            return name_key(run) in taken or _is_used(self.runs / run)

        return unique_name(recipe.name, is_taken)


def require_no_source(path: Path, sources: Iterable[Path]) -> None:
    """Returns if writing to a path does not replace one of the files that are read.

    Raises:
        OutputError: it would.
    """
    if path.exists() and any(path.samefile(source) for source in sources):
        raise OutputError(f"{path} is one of the files that are read", hint="choose another name")


def _is_used(folder: Path) -> bool:
    """Tells whether there is anything in a folder but what a killed process has left of a run."""
    if not folder.is_dir() or folder.is_symlink():
        return os.path.lexists(folder)
    return any(owner_of(path.name) is None for path in folder.iterdir())


def average_id_of(path: Path) -> str | None:
    """Returns the id of the average that a hyper-model holds; None for any other or missing file."""
    return metadata_of(path).get(AVERAGE_ID)


def metadata_of(path: Path) -> Mapping[str, str]:
    """Returns the metadata of a checkpoint or LoRA; nothing for any other or missing file."""
    try:
        return read_header(path).metadata
    except CheckpointError:
        return {}


def _deciding(recipe: object) -> object:
    """Returns a recipe's metadata without the device and without ranks that were searched for."""
    if not isinstance(recipe, dict):
        return None
    derived = {} if recipe.get("budget") == recipe.get("target") else {"ranks"}
    return {name: text for name, text in recipe.items() if name not in {"device", *derived}}


def _journals(folder: Path) -> list[Path]:
    """Returns the journals in a folder; none where another process deletes it just now."""
    with suppress(FileNotFoundError):
        return list(folder.glob(JOURNALS))
    return []
