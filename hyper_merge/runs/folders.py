"""The folders of a host: where everything goes, what is there already, which names are free."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import (
    CheckpointError,
    NameTakenError,
    OutputError,
    SameMergeError,
)
from hyper_merge.loras.cards import CARD_SUFFIXES
from hyper_merge.loras.metadata import KIND
from hyper_merge.recipe.recipe import AVERAGE, Recipe
from hyper_merge.runtime.formatting import GB
from hyper_merge.runtime.names import file_stem, name_key, unique_name

SIZE_LIMIT: Final = 20 * GB  # bytes of all analyses; the least recently used go first
AVERAGE_ID: Final = "hyper_merge.average_id"
"""Metadata of a hyper-model: equal for the same average of the same files."""

MANIFEST: Final = "manifest.json"
MULTIPLIERS: Final = "multipliers.txt"
REPORT: Final = "report.txt"
FITS: Final = "fits"
"""Folder within a run's: a record and a text for each checkpoint that was fitted later."""

PICTURES: Final = "pictures"
"""Folder within a run's: a grid and its figures for each comparison with the originals."""

RUN_FILES: Final = (MULTIPLIERS, REPORT, MANIFEST)  # of a run's folder


@dataclass(frozen=True)
class Place:
    """Where one run's files go."""

    run: str  # name of the run and first part of its LoRAs' names
    hyper_model: Path  # to be used with the LoRAs
    exists: bool  # the hyper-model is there already, and the right one
    loras: Path  # folders
    folder: Path  # of manifest, multipliers and report


@dataclass(frozen=True)
class Folders:
    """Where everything goes; none of the folders need exist yet."""

    models: Path  # hyper-models
    loras: Path
    runs: Path  # a folder per run, with manifest, multipliers and report
    cache: Path  # analyses and hashes
    cache_limit: int = SIZE_LIMIT  # bytes of all analyses

    @classmethod
    def under(cls, root: Path) -> Folders:
        """The folders of a WebUI-shaped models folder."""
        runs = root / "hyper-merge"
        return cls(root / "Stable-diffusion", root / "Lora", runs, runs / "cache")

    def place(self, recipe: Recipe, average_id: str) -> Place:
        """Where a recipe's files go.

        A hyper-model of the same checkpoints is used again; another list of ranks then makes a run
        of its own, `<name>-2`, for hosts cache LoRAs by path.

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
            self._require_same_case(recipe.name)
        run = recipe.name if recipe.overwrite else self._free_run(recipe, average_id)
        found = existing or new
        return Place(run, found, existing is not None, self.loras, self.runs / run)

    def manifests(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every run's folder with its manifest; unreadable ones are passed over."""
        for path in sorted(self.runs.glob(f"*/{MANIFEST}")):
            try:
                manifest = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                continue
            if isinstance(manifest, dict):
                yield path.parent, manifest

    def hyper_model_of(self, manifest: Mapping[str, Any]) -> Path:
        """The file that a run's LoRAs are added to, also after everything was moved or copied."""
        recorded = Path(str(manifest.get("hyper_model")))
        here = self.models / recorded.name
        is_here = average_id_of(here) == manifest.get("average_id") or not path_exists(recorded)
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
            folder.name
            for folder, manifest in self.manifests()
            if folder.name != replaced
            and manifest.get("average_id") != average_id
            and same_place(self.hyper_model_of(manifest), path)
        ]
        if users:
            what = "run" if len(users) == 1 else "runs"
            raise NameTakenError(
                f"{path.name} is the hyper-model of the {what} {', '.join(users)}, and their"
                " LoRAs go with no other",
                hint=f"choose another name, or delete the {what} first",
            )

    def lora_files(self, names: Iterable[str]) -> list[Path]:
        """The files of LoRAs, as far as they are there, each with its card and picture.

        A LoRA of that name which Hyper-Merge did not write is left out with all that is beside it.
        """
        return [
            path
            for name in names
            if not _is_foreign(self.loras / f"{name}.safetensors")
            for path in (
                self.loras / f"{name}{suffix}" for suffix in (".safetensors", *CARD_SUFFIXES)
            )
            if os.path.lexists(path)
        ]

    def lora_files_of(self, run: str) -> list[Path]:
        """The files of a run's LoRAs as its manifest names them; none where it says nothing."""
        manifests = {folder.name: manifest for folder, manifest in self.manifests()}
        own = re.compile(re.escape(run) + r"_(\d+-\d+(-exact)?|top-[^/\\]+)")  # nothing else
        listed = _lora_names(manifests.get(run, {}))
        return self.lora_files(name for name in listed if own.fullmatch(name))

    def fit_files_of(self, run: str, name: str | None = None) -> list[Path]:
        """The files of a run's fits, or of one: records, texts, and private LoRAs that are ours."""
        folder = self.runs / run / FITS
        own = re.compile(re.escape(run) + r"_fit-[^/\\]+")  # nothing that leads elsewhere
        files: list[Path] = []
        for path in () if folder.is_symlink() else sorted(folder.glob("*.json")):
            names = _topup_names(path)
            if names is not None and (name is None or path.stem in (name, file_stem(name))):
                words = path.with_name(path.stem + ".txt")
                files += [path, *([words] if os.path.lexists(words) else [])]
                files += self.lora_files(name for name in names if own.fullmatch(name))
        return files

    def picture_files_of(self, run: str) -> list[Path]:
        """Grids and figures of a run's comparisons; nothing that somebody else put there."""
        folder = self.runs / run / PICTURES
        found = [] if folder.is_symlink() else sorted(folder.glob("comparison-*"))
        own = re.compile(r"comparison-\d+\.(png|json)")
        return [path for path in found if own.fullmatch(path.name)]

    def lora_owners(self) -> dict[str, str]:
        """The run of every LoRA of merges and fits, be its file there or not, by its `name_key`."""
        return {
            name_key(lora): folder.name
            for folder, manifest in self.manifests()
            for lora in (*_lora_names(manifest), *self.fitted_names(folder.name))
        }

    def fitted_names(self, run: str, but: str = "") -> list[str]:
        """The private LoRAs of a run's fits, less those of one fit, as their records name them."""
        folder = self.runs / run / FITS
        records = () if folder.is_symlink() else sorted(folder.glob("*.json"))
        others = (path for path in records if path.stem not in (but, file_stem(but)))
        return [name for path in others for name in _topup_names(path) or ()]

    def hyper_model_for(self, recipe: Recipe, average_id: str) -> Path | None:
        """An existing file that a recipe's LoRAs can be added to; None if it is to be made."""
        if recipe.base != AVERAGE:
            return Path(recipe.base)
        candidates = [self.models / f"{recipe.name}.safetensors"]
        for _, manifest in self.manifests():
            if manifest.get("average_id") == average_id:
                candidates.append(self.models / Path(str(manifest.get("hyper_model"))).name)
        return next((path for path in candidates if average_id_of(path) == average_id), None)

    def _require_same_case(self, run: str) -> None:
        """Raises an `OutputError` if a run has this name in other letters of case."""
        for folder, _ in self.manifests():
            if folder.name != run and name_key(folder.name) == name_key(run):
                raise NameTakenError(
                    f"the run {folder.name} is there, and its name differs from {run} by case"
                    " alone",
                    hint=f"write {folder.name} to replace it, or choose another name",
                )

    def _free_run(self, recipe: Recipe, average_id: str) -> str:
        """The recipe's name, or the first of name-2, name-3, ... that no other run has.

        Raises:
            OutputError: a run with this very recipe is there already.
        """
        wanted = _deciding(recipe.to_metadata()), average_id
        taken = {
            name_key(folder.name): (_deciding(manifest.get("recipe")), manifest.get("average_id"))
            for folder, manifest in self.manifests()
        }

        def is_taken(run: str) -> bool:
            if taken.get(name_key(run)) == wanted:
                raise SameMergeError(
                    f"the run {run} is this very merge already",
                    hint="choose another name or other ranks",
                )
            return name_key(run) in taken or (self.runs / run).exists()

        return unique_name(recipe.name, is_taken)


def require_no_source(path: Path, sources: Iterable[Path]) -> None:
    """Returns if writing to a path does not replace one of the checkpoints that are read.

    Raises:
        OutputError: it would.
    """
    if path.exists() and any(path.samefile(source) for source in sources):
        raise OutputError(
            f"{path} is one of the checkpoints of this merge", hint="choose another name"
        )


def path_exists(path: Path) -> bool:
    """Whether a path that a manifest names leads to something."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a NUL character
        return False


def same_place(one: Path, other: Path) -> bool:
    """Whether two paths lead to one place, be there a file or not."""
    try:
        return os.path.realpath(one) == os.path.realpath(other)
    except ValueError:  # a NUL character: no path at all
        return False


def average_id_of(path: Path) -> str | None:
    """The average that a hyper-model holds; None for any other file, or none."""
    return metadata_of(path).get(AVERAGE_ID)


def _lora_names(manifest: Mapping[str, Any]) -> list[str]:
    """The LoRAs and companions of a run as its manifest names them."""
    report = manifest.get("report")
    if not isinstance(report, dict):
        return []
    lists = [report.get(key) for key in ("loras", "companions")]
    rows = report.get("checkpoints")
    rows = rows if isinstance(rows, list) else []
    lists.append([row.get("topup") for row in rows if isinstance(row, dict)])
    return [str(name) for names in lists if isinstance(names, list) for name in names if name]


def _topup_names(record: Path) -> list[str] | None:
    """The private LoRAs of a fit; None for a file that is no record of one."""
    try:
        fit = json.loads(record.read_text(encoding="utf-8"))["fit"]
        return [str(each["name"]) for each in fit["topups"]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _is_foreign(lora: Path) -> bool:
    """Whether a file is there that is not a LoRA of ours by this name."""
    metadata = metadata_of(lora)
    own = metadata.get(KIND) == "lora" and metadata.get("ss_output_name") == lora.stem
    return os.path.lexists(lora) and not own


def metadata_of(path: Path) -> Mapping[str, str]:
    """What a checkpoint or LoRA says of itself; nothing for any other file, or none."""
    try:
        return read_header(path).metadata
    except CheckpointError:
        return {}


def _deciding(recipe: object) -> object:
    """A recipe's metadata without the device, which decides nothing, and ranks that were found."""
    if not isinstance(recipe, dict):
        return None
    found = {} if recipe.get("budget") == recipe.get("target") else {"ranks"}
    return {name: text for name, text in recipe.items() if name not in {"device", *found}}
