"""Finds the layer that a module of a LoRA file belongs to, however the file spells its name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.architectures.lora_modules import diffusers_unet_path
from hyper_merge.checkpoints.architectures.signatures import UNET

_UNET_PREFIXES: Final = (
    *("lora_unet_", "diffusion_model_", "model_diffusion_model_", "unet_", "transformer_"),
)
_OWN_PREFIXES: Final = ("lora_unet_", "diffusion_model.", "transformer.")  # of the families
_WEIGHT: Final = ".weight"
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


class ModuleIndex:
    """The layers of a network by every name that LoRA files have for them."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        """Takes the layers of all parts."""
        self._layers = {name: layer for layer in layers for name in _names(layer)}

    def count_unknown(self, spelled: Iterable[str]) -> int:
        """Returns how many of the names belong to no layer."""
        return sum(self.find(name) is None for name in spelled)

    def find(self, spelled: str) -> Layer | None:
        """Returns the layer of a module's name as a file spells it; None for an unknown module."""
        return self._layers.get(spelled.replace(".", "_"))


def _names(layer: Layer) -> Iterator[str]:
    if layer.part == "unet":
        for path in _unet_paths(layer):
            yield path
            yield from (prefix + path for prefix in _UNET_PREFIXES)
        return
    for own, prefixes in _ENCODERS.items():
        if layer.module.startswith(own):
            yield from (prefix + layer.module.removeprefix(own) for prefix in prefixes)


def _unet_paths(layer: Layer) -> Iterator[str]:
    """Yields the paths of a layer of the denoiser in all spellings, with underscores."""
    stored = layer.key.removeprefix(UNET).removesuffix(_WEIGHT)
    own = next((p for p in _OWN_PREFIXES if layer.module.startswith(p)), "")
    paths = {layer.module.removeprefix(own).replace(".", "_")}
    if not layer.rows:
        paths.add(stored.replace(".", "_"))
    diffusers = diffusers_unet_path(stored)
    if diffusers:
        paths.add(diffusers.replace(".", "_"))
    for path in paths:
        yield path
        if path.endswith("_to_out_0"):  # as the attention processors of 2023 call it
            yield path.removesuffix("_0")
