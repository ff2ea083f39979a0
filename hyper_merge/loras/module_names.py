"""Finds the layers that a module of a LoRA file belongs to, however the file spells its name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Final

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.architectures.lora_modules import diffusers_unet_path
from hyper_merge.checkpoints.architectures.signatures import UNET
from hyper_merge.checkpoints.architectures.spec import Family

_UNET_PREFIXES: Final = (
    *("lora_unet_", "diffusion_model_", "model_diffusion_model_", "unet_", "transformer_"),
    *("lora_transformer_", "lycoris_"),  # OneTrainer and SimpleTuner
)
_OWN_PREFIXES: Final = ("lora_unet_", "diffusion_model.", "transformer.")  # of the families
_WEIGHT: Final = ".weight"
_BLOCK_NUMBER: Final = re.compile(r"(?<=s_)\d+(?=_)")  # blocks_7_, layers_7_
# What stands before `text_model...` in the names of each text encoder.
_ENCODERS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "lora_te_": (
            *("lora_te_", "lora_te1_", "text_encoder_"),
            *("text_encoders_clip_l_transformer_", "text_encoders_clip_h_transformer_"),
        ),
        "lora_te1_": ("lora_te1_", "text_encoder_", "text_encoders_clip_l_transformer_"),
        "lora_te2_": ("lora_te2_", "text_encoder_2_", "text_encoders_clip_g_transformer_"),
    }
)


@dataclass(frozen=True)
class Place:
    """Rows of a layer's matrix that are rows of the matrix of a module in a file.

    Most modules are one layer. Several are one layer where a checkpoint stores them fused, and the other
    way round where LoRAs of the family are written split.
    """

    layer: Layer
    shape: tuple[int, int]  # of the module's matrix
    rows: tuple[int, int]  # of the layer's matrix: first, end
    taken: tuple[int, int]  # of the module's matrix: first, end
    swapped: bool = False  # the two halves of the module's rows are in the other order
    converted: bool = False  # the name is diffusers', which has other modules than the checkpoint


class ModuleIndex:
    """The layers of a network by every name that LoRA files have for them."""

    def __init__(self, layers: Iterable[Layer], family: Family) -> None:
        """Takes the layers of all parts, and the family that they belong to."""
        self._places: dict[str, tuple[Place, ...]] = {}
        layers = tuple(layers)
        for layer in layers:
            place = Place(layer, (layer.m, layer.n), (0, layer.m), (0, layer.m))
            self._places.update(dict.fromkeys(_names(layer), (place,)))
        for path, place in _split_places(layers, family):
            self._places.update(dict.fromkeys(_with_prefixes(path), (place,)))
        for path, places in _fused_places(layers):
            self._places.update(dict.fromkeys(_with_prefixes(path), places))

    def count_unknown(self, spelled: Iterable[str]) -> int:
        """Returns how many of the names belong to no layer."""
        return sum(not self.find(name) for name in spelled)

    def find(self, spelled: str) -> tuple[Place, ...]:
        """Returns where a module belongs, by its name in a file; nothing for an unknown module."""
        return self._places.get(_flat(spelled), ())

    def has_own_names(self, spelled: Iterable[str]) -> bool:
        """Tells whether none of the names is one that diffusers alone has for the network."""
        return not any(place.converted for name in spelled for place in self.find(name))

    def has_all_blocks(self, spelled: Iterable[str]) -> bool:
        """Tells whether modules of a kind are there in all blocks that the network has, or in none.

        Trainers choose modules by their kind, so that a file that has some blocks of a network only is
        rather of another one with fewer blocks.
        """
        kinds = Counter(_kind(_flat(name)) for name in spelled)
        return all(self._kinds[kind] == count for kind, count in kinds.items())

    @cached_property
    def _kinds(self) -> Counter[str]:
        return Counter(map(_kind, self._places))


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _kind(name: str) -> str:
    return _BLOCK_NUMBER.sub("#", name)


def _names(layer: Layer) -> Iterator[str]:
    if layer.part == "unet":
        for path in _unet_paths(layer):
            yield from _with_prefixes(path)
        return
    for own, prefixes in _ENCODERS.items():
        if layer.module.startswith(own):
            yield from (prefix + layer.module.removeprefix(own) for prefix in prefixes)


def _with_prefixes(path: str) -> Iterator[str]:
    """Yields a path with underscores in the denoiser as files spell it."""
    # Attention processors of 2023 have no number after this.
    for name in (path, path.removesuffix("_0")) if path.endswith("_to_out_0") else (path,):
        yield name
        yield from (prefix + name for prefix in _UNET_PREFIXES)


def _unet_paths(layer: Layer) -> set[str]:
    """Returns the paths of a layer of the denoiser in all spellings, with underscores."""
    stored = _stored_path(layer)
    own = next((p for p in _OWN_PREFIXES if layer.module.startswith(p)), "")
    paths = {_flat(layer.module.removeprefix(own))}
    if not layer.rows:
        paths.add(_flat(stored))
    diffusers = diffusers_unet_path(stored)
    if diffusers:
        paths.add(_flat(diffusers))
    return paths


def _stored_path(layer: Layer) -> str:
    return layer.key.removeprefix(UNET).removesuffix(_WEIGHT)


def _split_places(layers: Iterable[Layer], family: Family) -> Iterator[tuple[str, Place]]:
    """Yields the modules that diffusers has in place of layers, by their paths with underscores."""
    rules = {part.name: part.split_modules for part in family.parts if part.prefix == UNET}
    for layer in layers:
        if layer.part not in rules or layer.rows:
            continue
        for module in rules[layer.part](_stored_path(layer), layer.shape):
            first, end = module.rows
            place = Place(layer, (end - first, layer.n), module.rows, (0, end - first))
            yield _flat(module.path), replace(place, swapped=module.swapped, converted=True)


def _fused_places(layers: Iterable[Layer]) -> Iterator[tuple[str, tuple[Place, ...]]]:
    """Yields the matrices of the denoiser whose rows are several layers, by their stored paths."""
    fused: dict[str, list[tuple[Layer, tuple[int, int]]]] = {}
    for layer in layers:
        if layer.part == "unet" and layer.rows:
            fused.setdefault(_flat(_stored_path(layer)), []).append((layer, layer.rows))
    for path, parts in fused.items():
        m = max(end for _, (_, end) in parts)
        yield (
            path,
            tuple(Place(layer, (m, layer.n), (0, layer.m), rows) for layer, rows in parts),
        )
