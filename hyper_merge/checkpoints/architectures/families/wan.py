"""Wan 2.1 and 2.2: a transformer for videos and, with one frame, for pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from hyper_merge.checkpoints.architectures.families.shared import VAE, transformer_part
from hyper_merge.checkpoints.architectures.lora_modules import Module, modules_matching
from hyper_merge.checkpoints.architectures.signatures import UNET
from hyper_merge.checkpoints.architectures.spec import DetectionRule, Family
from hyper_merge.checkpoints.io.header import Shape

_HEAD: Final = UNET + "head.modulation"
_BLOCK: Final = UNET + "blocks.0.ffn.0."
_IMAGE: Final = UNET + "blocks.0.cross_attn.k_img."
# Networks that read more than a text and a first picture.
_EXTENDED: Final = tuple(
    UNET + name
    for name in (
        *("vace_patch_embedding.", "control_adapter.", "face_adapter.", "ref_conv."),
        *("audio_proj.", "casual_audio_encoder.", "motion_encoder."),
    )
)
_MODULES: Final = r"blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.([qkvo]|[kv]_img)|ffn\.[02])"


_ENDS: Final = r"(text|time)_embedding\.[02]|time_projection\.1|head\.head"


def _ends(path: str, shape: Shape) -> tuple[Module, ...]:
    return modules_matching(path, shape, _ENDS)


def _modules(path: str, shape: Shape) -> tuple[Module, ...]:
    """Returns the matrices of the blocks; diffusers needs them all of every block."""
    return tuple(replace(m, bundle="all") for m in modules_matching(path, shape, _MODULES))


WAN: Final = Family(
    name="wan",
    title="Wan",
    rule=DetectionRule((_HEAD, _BLOCK), none_of=(_IMAGE, *_EXTENDED)),
    parts=(transformer_part(_modules, foreign_modules=_ends),),
    vae_prefixes=VAE,
    strains=("high", "low", "2.2"),  # the experts of 2.2 for much and for little noise
    in_a1111=False,
    half=torch.bfloat16,
    ss_base_model_version="wan",
    modelspec_architecture="wan2.1",
    modelspec_implementation="https://github.com/Wan-Video/Wan2.1",
    modelspec_resolution="832x480",
    sd_version="Unknown",
)

IMAGE_TO_VIDEO: Final = replace(
    WAN,
    name="wan_i2v",
    title="Wan 2.1 from pictures",
    rule=DetectionRule((_HEAD, _BLOCK, _IMAGE), none_of=_EXTENDED),
    strains=(),
)

FAMILIES: Final = (
    WAN,
    IMAGE_TO_VIDEO,
    Family("wan_extended", "Wan with control networks", DetectionRule((_HEAD, _BLOCK))),
)
