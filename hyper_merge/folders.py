"""The folders of a host: where everything goes, what is there already, which names are free."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hyper_merge.analysis_cache import SIZE_LIMIT
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import CheckpointError, OutputError
from hyper_merge.recipe import AVERAGE, Recipe

AVERAGE_ID: Final = "hyper_merge.average_id"
"""Metadata of a hyper-model: equal for the same average of the same files."""

MANIFEST: Final = "manifest.json"


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
            OutputError: the name is taken by something else, or by the same run.
        """
        existing = self._hyper_model(recipe, average_id)
        new = self.models / f"{recipe.name}.safetensors"
        if existing is None:
            require_no_source(new, recipe.models)
        if existing is None and new.exists() and not recipe.overwrite:
            raise OutputError(
                f"{new} exists and is not the average of these checkpoints; choose another name or"
                " allow overwriting"
            )
        run = recipe.name if recipe.overwrite else self._free_run(recipe, average_id)
        found = existing or new
        return Place(run, found, existing is not None, self.loras, self.runs / run)

    def manifests(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every run's folder with its manifest; unreadable ones are passed over."""
        for path in sorted(self.runs.glob(f"*/{MANIFEST}")):
            try:
                manifest = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(manifest, dict):
                yield path.parent, manifest

    def _hyper_model(self, recipe: Recipe, average_id: str) -> Path | None:
        """An existing file that serves as the base of the LoRAs."""
        if recipe.base != AVERAGE:
            return Path(recipe.base)
        candidates = [self.models / f"{recipe.name}.safetensors"]
        for _, manifest in self.manifests():
            if manifest.get("average_id") == average_id:
                candidates.append(self.models / Path(str(manifest.get("hyper_model"))).name)
        return next((path for path in candidates if _average_id(path) == average_id), None)

    def _free_run(self, recipe: Recipe, average_id: str) -> str:
        """The recipe's name, or the first of name-2, name-3, ... that no other run has.

        Raises:
            OutputError: a run with this very recipe is there already.
        """
        wanted = recipe.to_metadata(), average_id
        taken = {
            folder.name: (manifest.get("recipe"), manifest.get("average_id"))
            for folder, manifest in self.manifests()
        }
        number, run = 1, recipe.name
        while run in taken or (self.runs / run).exists():
            if taken.get(run) == wanted:
                raise OutputError(
                    f"{self.runs / run} holds this very merge already; choose another name or ranks,"
                    " or allow overwriting"
                )
            number += 1
            run = f"{recipe.name}-{number}"
        return run


def require_no_source(path: Path, sources: Iterable[Path]) -> None:
    """Returns if writing to a path does not replace one of the checkpoints that are read.

    Raises:
        OutputError: it would.
    """
    if path.exists() and any(path.samefile(source) for source in sources):
        raise OutputError(f"{path} is one of the checkpoints of this merge; choose another name")


def _average_id(path: Path) -> str | None:
    try:
        return read_header(path).metadata.get(AVERAGE_ID)
    except CheckpointError:
        return None
