"""Z-Image and Lumina 2: transformers whose blocks read pixels and text together, after refiners of each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch

from hyper_merge.checkpoints.architectures.diffusers_layout import DiffusersLayout
from hyper_merge.checkpoints.architectures.families.shared import NATIVE, VAE, transformer_part
from hyper_merge.checkpoints.architectures.lora_modules import Module, modules_matching
from hyper_merge.checkpoints.architectures.signatures import UNET
from hyper_merge.checkpoints.architectures.spec import PEFT, DetectionRule, Family
from hyper_merge.checkpoints.architectures.split_modules import SplitModule, split_modules
from hyper_merge.checkpoints.io.header import Shape

_REFINER: Final = UNET + "noise_refiner.0.attention.k_norm."
_BLOCK: Final = r"(layers|noise_refiner|context_refiner)\.\d+"
_QKV: Final = re.compile(_BLOCK + r"\.attention\.qkv")
_Z_IMAGE: Final = (
    _BLOCK + r"\.(attention\.out|feed_forward\.w[123])"
    r"|(layers|noise_refiner)\.\d+\.adaLN_modulation\.0"
)
_LUMINA: Final = (
    _BLOCK + r"\.(attention\.(qkv|out)|feed_forward\.w[123])"
    r"|(layers|noise_refiner)\.\d+\.adaLN_modulation\.1"
)
_EMBEDDERS: Final = (
    r"x_embedder|cap_embedder\.1|t_embedder\.mlp\.[02]"
    r"|final_layer\.(linear|adaLN_modulation\.1)"
)
_PATCHED: Final = re.compile(r"(x_embedder|final_layer)(\..+)?")  # diffusers has one for each size
_OUT: Final = ".attention.out"
_BLOCKS: Final = ("layers", "noise_refiner", "context_refiner")
_LUMINA_DIFFUSERS: Final[Mapping[str, tuple[str, ...]]] = {
    f"{blocks}.#.{stored}": tuple(f"{blocks}.#.{name}" for name in names)
    for blocks in _BLOCKS
    for stored, names in {
        "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "attention.out": ("attn.to_out.0",),
        "feed_forward.w1": ("feed_forward.linear_1",),
        "feed_forward.w2": ("feed_forward.linear_2",),
        "feed_forward.w3": ("feed_forward.linear_3",),
        "adaLN_modulation.1": ("norm1.linear",),
    }.items()
} | {
    "x_embedder": ("x_embedder",),
    "cap_embedder.1": ("time_caption_embed.caption_embedder.1",),
    "t_embedder.mlp.0": ("time_caption_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_caption_embed.timestep_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear_1",),
    "final_layer.linear": ("norm_out.linear_2",),
}
# Z-Image's names in diffusers, which some trainers keep for Lumina 2.
_LIKE_Z_IMAGE: Final[Mapping[str, tuple[str, ...]]] = {
    key: tuple(name.replace(".attn.", ".attention.") for name in names)
    for key, names in _LUMINA_DIFFUSERS.items()
    if ".attention." in key
}

_SAME: Final = (
    r"(\w+)\.\d+\.(feed_forward\.w[123]|adaLN_modulation\.0|(attention|ffn)_norm[12])\.(weight|bias)"
    r"|(cap_embedder|t_embedder)\..+|(x|cap)_pad_token|norm_final\.weight"
)
Z_IMAGE_LAYOUT_IN_DIFFUSERS: Final = DiffusersLayout(
    ("all_x_embedder.2-1.", "layers.0.attention.to_q.", "all_final_layer.2-1."),
    {
        f"{blocks}.#.{stored}": tuple(f"{blocks}.#.{name}" for name in names)
        for blocks in _BLOCKS
        for stored, names in {
            "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
            "attention.out": ("attention.to_out.0",),
        }.items()
    }
    | {
        "x_embedder": ("all_x_embedder.2-1",),
        "final_layer.linear": ("all_final_layer.2-1.linear",),
        "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
    },
    {
        f"{blocks}.#.attention.{x}_norm.weight": f"{blocks}.#.attention.norm_{x}.weight"
        for blocks in _BLOCKS
        for x in "qk"
    },
    _SAME,
)
LUMINA_LAYOUT_IN_DIFFUSERS: Final = DiffusersLayout(
    ("x_embedder.", "layers.0.attn.to_q.", "norm_out.linear_2."),
    _LUMINA_DIFFUSERS,
    {
        f"{blocks}.#.{stored}.weight": f"{blocks}.#.{name}.weight"
        for blocks in _BLOCKS
        for stored, name in {
            "attention.q_norm": "attn.norm_q",
            "attention.k_norm": "attn.norm_k",
            "attention_norm1": "norm1" if blocks == "context_refiner" else "norm1.norm",
            "attention_norm2": "norm2",
            "ffn_norm1": "ffn_norm1",
            "ffn_norm2": "ffn_norm2",
        }.items()
    }
    | {"cap_embedder.0.weight": "time_caption_embed.caption_embedder.0.weight"},
)


def _z_image_modules(path: str, shape: Shape) -> tuple[Module, ...]:
    """Returns the modules by diffusers' names, which ComfyUI and Forge Neo take too.

    Query, key and value are stored as one tensor and are three modules: diffusers drops those of a fused
    one without a word.
    """
    if _QKV.fullmatch(path):
        stem, width = path.removesuffix("qkv"), shape[0] // 3
        return tuple(
            Module(f"{stem}to_{letter}", (width, *shape[1:]), (place * width, (place + 1) * width))
            for place, letter in enumerate("qkv")
        )
    modules = modules_matching(path, shape, _Z_IMAGE)
    if path.endswith(_OUT):
        return tuple(replace(m, path=path.removesuffix("out") + "to_out.0") for m in modules)
    return modules


def _z_image_embedders(path: str, shape: Shape) -> tuple[Module, ...]:
    modules = modules_matching(path, shape, _EMBEDDERS)
    patched = _PATCHED.fullmatch(path)
    if patched is None:
        return modules
    return tuple(replace(m, path=f"all_{patched[1]}.2-1{patched[2] or ''}") for m in modules)


def _lumina_embedders(path: str, shape: Shape) -> tuple[Module, ...]:
    return modules_matching(path, shape, _EMBEDDERS)


def _lumina_modules(path: str, shape: Shape) -> tuple[Module, ...]:
    """Returns the modules by the checkpoint's names.

    Key and value have fewer rows than the query: ComfyUI would put split ones on wrong rows. diffusers
    needs all modules of all blocks.
    """
    return tuple(replace(m, bundle="all") for m in modules_matching(path, shape, _LUMINA))


def _split_lumina_modules(path: str, shape: Shape) -> tuple[SplitModule, ...]:
    tables = (_LUMINA_DIFFUSERS, _LIKE_Z_IMAGE)
    return tuple(module for names in tables for module in split_modules(path, shape, names))


Z_IMAGE: Final = Family(
    name="z_image",
    title="Z-Image",
    rule=DetectionRule((_REFINER, UNET + "layers.0.adaLN_modulation.0.")),
    parts=(transformer_part(_z_image_modules, NATIVE, foreign_modules=_z_image_embedders),),
    vae_prefixes=VAE,
    lora_alpha=False,
    lora_spelling=PEFT,
    strains=("turbo",),
    in_a1111=False,
    half=torch.bfloat16,
    ss_base_model_version="zimage",
    modelspec_architecture="Z-Image",
    modelspec_implementation="https://github.com/Tongyi-MAI/Z-Image",
    modelspec_resolution="1024x1024",
    sd_version="Unknown",
)

LUMINA_2: Final = replace(
    Z_IMAGE,
    name="lumina_2",
    title="Lumina 2",
    rule=DetectionRule((_REFINER, UNET + "layers.0.adaLN_modulation.1.")),
    parts=(transformer_part(_lumina_modules, NATIVE, _split_lumina_modules, _lumina_embedders),),
    strains=(),
    ss_base_model_version="lumina",
    modelspec_architecture="lumina-2",
    modelspec_implementation="https://github.com/Alpha-VLLM/Lumina-Image-2.0",
)

FAMILIES: Final = (
    Family("z_image_omni", "Z-Image Omni", DetectionRule((_REFINER, UNET + "siglip_embedder."))),
    Family("z_image_pixel", "Z-Image in pixels", DetectionRule((_REFINER, UNET + "dec_net."))),
    Family("newbie", "NewBie", DetectionRule((_REFINER, UNET + "clip_text_pooled_proj."))),
    Z_IMAGE,
    LUMINA_2,
)
