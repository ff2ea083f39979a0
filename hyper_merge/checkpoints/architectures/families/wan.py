"""Wan 2.1 and 2.2: a transformer for videos and, with one frame, for pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch

from hyper_merge.checkpoints.architectures.diffusers_layout import DiffusersLayout
from hyper_merge.checkpoints.architectures.families.shared import VAE, transformer_part
from hyper_merge.checkpoints.architectures.lora_modules import Module, modules_matching
from hyper_merge.checkpoints.architectures.signatures import UNET
from hyper_merge.checkpoints.architectures.spec import DetectionRule, Family
from hyper_merge.checkpoints.architectures.split_modules import SplitModule, split_modules
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

_EMBEDDER: Final = "condition_embedder."
_DIFFUSERS: Final[Mapping[str, tuple[str, ...]]] = {
    **{
        f"blocks.#.{stored}_attn.{x}": (f"blocks.#.{name}.{module}",)
        for stored, name in (("self", "attn1"), ("cross", "attn2"))
        for x, module in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    },
    "blocks.#.cross_attn.k_img": ("blocks.#.attn2.add_k_proj",),
    "blocks.#.cross_attn.v_img": ("blocks.#.attn2.add_v_proj",),
    "blocks.#.ffn.0": ("blocks.#.ffn.net.0.proj",),
    "blocks.#.ffn.2": ("blocks.#.ffn.net.2",),
    "blocks.#.norm3": ("blocks.#.norm2",),
    **{
        f"{kind}_embedding.{i}": (f"{_EMBEDDER}{kind}_embedder.linear_{1 + i // 2}",)
        for kind in ("text", "time")
        for i in (0, 2)
    },
    "time_projection.1": (f"{_EMBEDDER}time_proj",),
    "img_emb.proj.0": (f"{_EMBEDDER}image_embedder.norm1",),
    "img_emb.proj.1": (f"{_EMBEDDER}image_embedder.ff.net.0.proj",),
    "img_emb.proj.3": (f"{_EMBEDDER}image_embedder.ff.net.2",),
    "img_emb.proj.4": (f"{_EMBEDDER}image_embedder.norm2",),
    "head.head": ("proj_out",),
}

LAYOUT_IN_DIFFUSERS: Final = DiffusersLayout(
    ("patch_embedding.", "blocks.0.attn1.to_q.", "proj_out."),
    _DIFFUSERS,
    {
        "blocks.#.modulation": "blocks.#.scale_shift_table",
        "head.modulation": "scale_shift_table",
        "blocks.#.cross_attn.norm_k_img.weight": "blocks.#.attn2.norm_added_k.weight",
    }
    | {
        f"blocks.#.{stored}_attn.norm_{x}.weight": f"blocks.#.{name}.norm_{x}.weight"
        for stored, name in (("self", "attn1"), ("cross", "attn2"))
        for x in "qk"
    },
    r"patch_embedding\.(weight|bias)",
)


def _ends(path: str, shape: Shape) -> tuple[Module, ...]:
    return modules_matching(path, shape, _ENDS)


def _modules(path: str, shape: Shape) -> tuple[Module, ...]:
    """Returns the matrices of the blocks; diffusers needs them all of every block."""
    return tuple(replace(m, bundle="all") for m in modules_matching(path, shape, _MODULES))


def _split_modules(path: str, shape: Shape) -> tuple[SplitModule, ...]:
    """Returns diffusers' name of a matrix: none is split."""
    return split_modules(path, shape, _DIFFUSERS)


WAN: Final = Family(
    name="wan",
    title="Wan",
    rule=DetectionRule((_HEAD, _BLOCK), none_of=(_IMAGE, *_EXTENDED)),
    parts=(transformer_part(_modules, split_modules=_split_modules, foreign_modules=_ends),),
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
