"""Describes the manifest of a run, the JSON file in its folder that later commands read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from hyper_merge import __version__
from hyper_merge.errors import RunError
from hyper_merge.recipe.recipe import AVERAGE, FIELDS, Recipe
from hyper_merge.runs.report import Report
from hyper_merge.runtime.checked_json import read_json

MANIFEST_VERSION: Final = 1
_FIRST_SETTINGS: Final = {"exact": "none"}  # where 0.1 knew none, and the default has changed since


@dataclass(frozen=True)
class RunSource:
    """A checkpoint that went into a run, as it was at that time."""

    path: Path
    name: str  # of its file
    sha256: str  # of the whole file, 64 hex digits
    legacy_hash: str  # A1111's 8 digits


@dataclass(frozen=True)
class RunManifest:
    """A run's files, sources and figures, as they are written."""

    name: str  # of the run
    created: str  # ISO 8601, with a time zone
    family: str  # as the families are named in files, "sd1"
    recipe: Mapping[str, str]  # as `Recipe.to_metadata` gives it
    settings: Mapping[str, Any] | None  # as `Recipe.to_settings` gives them; None in 0.1
    average_id: str | None
    hyper_model: Path
    sources: tuple[RunSource, ...]  # a given base first
    base_is_first_source: bool
    report: Report
    hashes: Mapping[str, str]  # SHA-256 of the tensors' bytes by the LoRA's name; empty in 0.1

    def to_json(self) -> dict[str, Any]:
        """Returns plain data in the order in which the file has them."""
        rows = self.report.checkpoints
        return {
            "version": MANIFEST_VERSION,
            "hyper_merge": __version__,
            "created": self.created,
            "name": self.name,
            "family": self.family,
            "recipe": dict(self.recipe),
            "settings": self.settings,
            "average_id": self.average_id,
            "hyper_model": str(self.hyper_model),
            "sources": [
                {
                    "path": str(source.path),
                    "name": source.name,
                    "sha256": source.sha256,
                    "legacy_hash": source.legacy_hash,
                }
                for source in self.sources
            ],
            "base_is_first_source": self.base_is_first_source,
            "multipliers": {row.name: list(row.multipliers) for row in rows},
            "text_multipliers": {row.name: list(row.text_multipliers) for row in rows},
            "report": self.report.as_dict(),
            "files": dict(self.hashes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunManifest:
        """Returns the manifest that `to_json` gave these data, or an earlier version did.

        Damaged entries for the hyper-model and the average are not refused: the run's LoRAs can
        still be listed and deleted.

        Raises:
            ValueError: a value is missing or of the wrong kind; says which.
        """
        settings = _mapping(data, "settings") if "settings" in data else None
        recipe = _mapping(data, "recipe") if settings is None else data.get("recipe")
        texts = recipe if isinstance(recipe, dict) else {}
        hashes = _mapping(data, "files") if "files" in data else {}
        return cls(
            name=_text(data, "name"),
            created=_time(data, "created"),
            family=_text(data, "family"),
            recipe={name: str(text) for name, text in texts.items()},
            settings=settings,
            average_id=_average_id(data),
            hyper_model=Path(str(data.get("hyper_model"))),
            sources=tuple(_source(value) for value in _list(data, "sources")),
            base_is_first_source=data.get("base_is_first_source") is True,
            report=Report.from_dict(_mapping(data, "report")),
            hashes={lora: _text(hashes, lora) for lora in hashes},
        )

    def to_recipe(self, output: Path) -> Recipe:
        """Returns the recipe of the run.

        Manifests of 0.1 hold it as texts without folders; the sources have the paths.

        Args:
            output: models folder of the run, which manifests of 0.1 do not name.

        Raises:
            RecipeError: a setting is unknown, missing or impossible.
        """
        if self.settings is not None:
            return Recipe.from_settings(self.settings, "settings")
        texts = self.recipe
        settings = {f.name: f.from_text(texts[f.name]) for f in FIELDS if f.name in texts}
        if texts.get("weights") == "equal":
            settings["weights"] = None
        paths = [str(source.path) for source in self.sources]
        base = paths[0] if self.base_is_first_source and paths else AVERAGE
        settings = {**_FIRST_SETTINGS, **settings}
        settings |= {"models": paths[self.base_is_first_source :], "base": base}
        return Recipe.from_settings({**settings, "output": str(output)}, "settings")


@dataclass(frozen=True)
class RunOutline:
    """The files that a run needs, as its manifest names them; nothing in it is checked."""

    folder: Path  # of the run
    recipe: object  # the recipe's metadata, text by name; anything where that is damaged
    average_id: str | None  # of the hyper-model; None where the manifest does not say
    hyper_model: Path  # where it was
    loras: tuple[str, ...]  # names of shared LoRAs, companions and private LoRAs
    source_paths: tuple[Path, ...]  # where the merged checkpoints were

    @property
    def name(self) -> str:
        """The run's name, which is that of its folder."""
        return self.folder.name

    @classmethod
    def from_json(cls, folder: Path, manifest: Mapping[str, Any]) -> RunOutline:
        """Returns the outline of a manifest; damaged values are left out."""
        sources = _as_list(manifest.get("sources"))
        paths = [Path(str(source.get("path"))) for source in sources if isinstance(source, dict)]
        return cls(
            folder=folder,
            recipe=manifest.get("recipe"),
            average_id=_average_id(manifest),
            hyper_model=Path(str(manifest.get("hyper_model"))),
            loras=tuple(_lora_names(manifest.get("report"))),
            source_paths=tuple(paths),
        )

    @classmethod
    def read(cls, path: Path) -> RunOutline | None:
        """Returns the outline of a manifest's file; None where the file holds no JSON object."""
        try:
            manifest = read_json(path)
        except (OSError, ValueError):
            return None
        return cls.from_json(path.parent, manifest) if isinstance(manifest, dict) else None


def require_readable_version(name: str, manifest: object) -> dict[str, Any]:
    """Returns the JSON object of a run's manifest if this version can read it.

    Raises:
        ValueError: it says no version.
        RunError: a newer version of Hyper-Merge wrote it.
    """
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if not isinstance(manifest, dict) or not isinstance(version, int):
        raise ValueError("it says no version")  # noqa: TRY004 - the file is wrong, not a type
    if version > MANIFEST_VERSION:
        raise RunError(
            f"the run {name} was made by Hyper-Merge {manifest.get('hyper_merge')}, this is"
            f" {__version__}",
            hint="update Hyper-Merge to open or delete it",
        )
    return manifest


def _average_id(manifest: Mapping[str, Any]) -> str | None:
    value = manifest.get("average_id")
    return value if value is None or isinstance(value, str) else ""  # that of no average


def _source(value: Any) -> RunSource:
    if not isinstance(value, dict):
        raise ValueError("a source is not described")  # noqa: TRY004 - as above
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


def _lora_names(report: object) -> list[str]:
    if not isinstance(report, dict):
        return []
    rows = [row for row in _as_list(report.get("checkpoints")) if isinstance(row, dict)]
    names = [
        *_as_list(report.get("loras")),
        *_as_list(report.get("companions")),
        *(row.get("topup") for row in rows),
    ]
    return [str(name) for name in names if name]


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
