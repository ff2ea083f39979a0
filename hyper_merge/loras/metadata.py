"""Makes the metadata of LoRA files and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch

from hyper_merge import __version__
from hyper_merge.checkpoints.architectures.spec import Family
from hyper_merge.loras.prompt_tags import format_tag
from hyper_merge.runtime.checked_json import parse_json

FORMAT_VERSION: Final = "1"
"""Version of the `hyper_merge.*` metadata; readers refuse a higher one."""


_ALL_HOSTS: Final = "AUTOMATIC1111, Forge and ComfyUI"
COMPANIONS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "auto": ("end layers", _ALL_HOSTS),
        "ends": ("end layers", _ALL_HOSTS),
        "norms": ("end layers and norms", _ALL_HOSTS),
        "all": ("end layers, norms and biases", "Forge and ComfyUI, not in AUTOMATIC1111"),
    }
)
"""The content of companions and the programs that load them, by the recipe's word."""

STANDALONE_KIND: Final = "lora-alone"
"""`hyper_merge.kind` of a LoRA that restores a checkpoint alone; "lora" needs others."""

_LONGEST: Final = 2**22  # characters of a text of others that is carried on: headers have a limit
_OWN: Final = "hyper_merge."
KIND: Final = _OWN + "kind"
RECIPE: Final = _OWN + "recipe"
RUN: Final = _OWN + "run"
COMPANION_CONTENT: Final = _OWN + "exact"
CHECKPOINT: Final = _OWN + "checkpoint"
"""Metadata of a LoRA that is of one checkpoint alone: its run, and the checkpoint's name."""


@dataclass(frozen=True)
class SourceRecord:
    """A checkpoint that went into a merge."""

    name: str  # of its file
    sha256: str  # of the whole file, 64 hex digits
    legacy_hash: str  # A1111's 8 digits
    metadata: Mapping[str, str]  # as the file has it: its own lineage is carried on


@dataclass(frozen=True)
class Lineage:
    """The origin that all files of one merge record."""

    name: str  # file stem of the hyper-model; of LoRAs that of their base, empty where unknown
    family: Family
    recipe: Mapping[str, str]  # as `Recipe.to_metadata` gives it
    sources: tuple[SourceRecord, ...]
    date: str  # ISO 8601
    of_loras: bool = False  # whether LoRAs were merged, which have no hyper-model


@dataclass(frozen=True)
class LoraFile:
    """One block's file, apart from its tensors."""

    lineage: Lineage
    run: str  # the first part of its name
    index: int  # place in the rank list, from 0
    count: int  # of the run's LoRAs
    rank: int  # in the run's list; small layers may have less
    multipliers: Mapping[str, float]  # by the checkpoint's file stem
    explained: (
        float | None
    )  # share 0..1 of all differences by all shared LoRAs, or of one's, if known
    dtype: torch.dtype = torch.float16  # of the stored factors
    alone: str | None = None  # the checkpoint that it restores without any other
    tops_up: str | None = None  # the checkpoint that it is added to the shared LoRAs for
    text_multipliers: Mapping[str, float] | None = None  # the text encoder's, if it has its own
    own_alpha: float | None = None  # where the file's alpha is not its rank

    @property
    def alpha(self) -> float:
        """The alpha of all modules; files of some families leave it out."""
        return float(self.rank) if self.own_alpha is None else self.own_alpha

    @property
    def users(self) -> tuple[str, ...]:
        """The checkpoints that it changes."""
        text = self.text_multipliers or {}
        return tuple(name for name, x in self.multipliers.items() if x or text.get(name))

    def tag(self, stem: str, checkpoint: str) -> str:
        """Returns the prompt tag that adds a LoRA of this stem for a checkpoint."""
        text = self.text_multipliers
        return format_tag(stem, self.multipliers[checkpoint], text[checkpoint] if text else None)


def lora_metadata(
    file: LoraFile, stem: str, model_hash: str, *, uniform: bool = True
) -> dict[str, str]:
    """Returns the metadata of a LoRA file.

    Args:
        file: the block's.
        stem: of the file; hosts take the LoRA's alias from here.
        model_hash: SHA-256 of the tensors' bytes in the file's order (`content_sha256`).
        uniform: whether every layer has the block's rank.
    """
    lineage = file.lineage
    dim, alpha = str(file.rank) if uniform else "Dynamic", str(file.alpha)
    return {
        "ss_base_model_version": lineage.family.ss_base_model_version,
        "ss_v2": lineage.family.ss_v2,
        "ss_network_module": "networks.lora",
        "ss_network_dim": dim,
        "ss_network_alpha": alpha,
        "ss_network_args": json_text({"conv_dim": dim, "conv_alpha": alpha}),
        "ss_output_name": stem,
        **({"ss_sd_model_name": f"{lineage.name}.safetensors"} if lineage.name else {}),
        "sshs_model_hash": model_hash,
        **_modelspec(lineage, stem, "/lora"),
        **_own(lineage, "lora" if file.alone is None else STANDALONE_KIND),
        _OWN + "index": str(file.index),
        _OWN + "rank": str(file.rank),
        _OWN + "multipliers": json_text(dict(file.multipliers)),
        **_text_multipliers(file),
        **_known(file),
    }


def checkpoint_metadata(lineage: Lineage, kind: str = "hyper-model") -> dict[str, str]:
    """Returns the metadata of a written checkpoint: A1111's lineage keys and ours."""
    ancestors: dict[str, Any] = {}
    for source in lineage.sources:
        ancestors |= _decoded(source.metadata.get("sd_merge_models")) or {}
    parents = {
        source.sha256: {
            "name": source.name,
            "legacy_hash": source.legacy_hash,
            "sd_merge_recipe": _decoded(source.metadata.get("sd_merge_recipe")),
        }
        for source in lineage.sources
    }
    return {
        "sd_merge_recipe": json_text({**lineage.recipe, "type": "hyper-merge"}),
        "sd_merge_models": json_text({**ancestors, **parents}),
        **_modelspec(lineage, lineage.name, ""),
        **_own(lineage, kind),
    }


def _known(file: LoraFile) -> dict[str, str]:
    """Returns the metadata that not every LoRA file has."""
    known = {} if file.explained is None else {_OWN + "explained": repr(float(file.explained))}
    one = file.alone or file.tops_up
    if one is not None:
        known |= {RUN: file.run, CHECKPOINT: one}
    return known


def _text_multipliers(file: LoraFile) -> dict[str, str]:
    multipliers = file.text_multipliers
    return {} if multipliers is None else {_OWN + "text_multipliers": json_text(dict(multipliers))}


def _modelspec(lineage: Lineage, title: str, suffix: str) -> dict[str, str]:
    family = lineage.family
    predicts = family.modelspec_prediction_type
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": family.modelspec_architecture + suffix,
        "modelspec.implementation": family.modelspec_implementation,
        "modelspec.title": title,
        "modelspec.resolution": family.modelspec_resolution,
        "modelspec.date": lineage.date,
        "modelspec.merged_from": ", ".join(source.name for source in lineage.sources),
        **({"modelspec.prediction_type": predicts} if predicts else {}),
    }


def _own(lineage: Lineage, kind: str) -> dict[str, str]:
    sources = [
        {"name": source.name, "sha256": source.sha256, "legacy_hash": source.legacy_hash}
        for source in lineage.sources
    ]
    return {
        _OWN + "format_version": FORMAT_VERSION,
        _OWN + "version": __version__,
        KIND: kind,
        _OWN + "name": lineage.name,
        RECIPE: json_text(dict(lineage.recipe)),
        _OWN + "lineage": json_text(sources),
    }


def json_text(value: object) -> str:
    """Returns the JSON of a value as metadata and cards hold it."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _decoded(text: str | None) -> dict[str, Any] | None:
    """Returns a JSON object of a foreign file's metadata; None for anything that cannot be written again."""
    if text is None or len(text) > _LONGEST:
        return None
    try:
        value = parse_json(text)
        json_text([[[[value]]]])  # it will stand that deep within others, or less
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
