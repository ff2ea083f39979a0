"""Flux: double and single blocks, with or without text encoders and VAE; and models made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch

from hyper_merge.checkpoints.architectures.diffusers_layout import DiffusersLayout
from hyper_merge.checkpoints.architectures.families.shared import CLIP_L, T5, VAE, transformer_part
from hyper_merge.checkpoints.architectures.lora_modules import (
    Module,
    clip_text_model,
    modules_matching,
    no_modules,
)
from hyper_merge.checkpoints.architectures.signatures import UNET
from hyper_merge.checkpoints.architectures.spec import DetectionRule, Family, NetworkPart
from hyper_merge.checkpoints.architectures.split_modules import SplitModule, split_modules
from hyper_merge.checkpoints.io.header import Shape

_DOUBLE: Final = UNET + "double_blocks.0.img_attn.norm.key_norm."
_SINGLE: Final = UNET + "single_blocks.0.linear1."
_GUIDANCE: Final = UNET + "guidance_in."
_APPROXIMATOR: Final = UNET + "distilled_guidance_layer."
_APPROXIMATOR_LAYERS: Final = 5
_MODULES: Final = (
    r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02]|mod\.lin)"
    r"|single_blocks\.\d+\.(linear[12]|modulation\.lin)"
)
# Forge and ComfyUI know every matrix of the transformer by its own name; other loaders only the blocks.
_ENDS: Final = (
    r"(img|txt)_in|(time|vector|guidance)_in\.(in|out)_layer"
    r"|final_layer\.(linear|adaLN_modulation\.1)"
)
_CHROMA_ENDS: Final = (
    r"(img|txt)_in|final_layer\.linear"
    r"|distilled_guidance_layer\.(in_proj|out_proj|layers\.\d+\.(in|out)_layer)"
)
_DIFFUSERS: Final[Mapping[str, tuple[str, ...]]] = {
    "double_blocks.#.img_attn.qkv": tuple(f"transformer_blocks.#.attn.to_{x}" for x in "qkv"),
    "double_blocks.#.txt_attn.qkv": tuple(f"transformer_blocks.#.attn.add_{x}_proj" for x in "qkv"),
    "double_blocks.#.img_attn.proj": ("transformer_blocks.#.attn.to_out.0",),
    "double_blocks.#.txt_attn.proj": ("transformer_blocks.#.attn.to_add_out",),
    "double_blocks.#.img_mlp.0": ("transformer_blocks.#.ff.net.0.proj",),
    "double_blocks.#.img_mlp.2": ("transformer_blocks.#.ff.net.2",),
    "double_blocks.#.txt_mlp.0": ("transformer_blocks.#.ff_context.net.0.proj",),
    "double_blocks.#.txt_mlp.2": ("transformer_blocks.#.ff_context.net.2",),
    "double_blocks.#.img_mod.lin": ("transformer_blocks.#.norm1.linear",),
    "double_blocks.#.txt_mod.lin": ("transformer_blocks.#.norm1_context.linear",),
    "single_blocks.#.linear1": (
        *(f"single_transformer_blocks.#.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.#.proj_mlp",
    ),
    "single_blocks.#.linear2": ("single_transformer_blocks.#.proj_out",),
    "single_blocks.#.modulation.lin": ("single_transformer_blocks.#.norm.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "distilled_guidance_layer.in_proj": ("distilled_guidance_layer.in_proj",),
    "distilled_guidance_layer.out_proj": ("distilled_guidance_layer.out_proj",),
    **{
        f"distilled_guidance_layer.layers.{i}.{stored}_layer": (
            f"distilled_guidance_layer.layers.{i}.linear_{number}",
        )
        for i in range(_APPROXIMATOR_LAYERS)
        for stored, number in (("in", 1), ("out", 2))
    },
}

_NORMS: Final[Mapping[str, str]] = {
    f"{stored}.{which}_norm.scale": f"{name}_{which[0]}.weight"
    for stored, name in (
        ("double_blocks.#.img_attn.norm", "transformer_blocks.#.attn.norm"),
        ("double_blocks.#.txt_attn.norm", "transformer_blocks.#.attn.norm_added"),
        ("single_blocks.#.norm", "single_transformer_blocks.#.attn.norm"),
    )
    for which in ("query", "key")
}

LAYOUT_IN_DIFFUSERS: Final = DiffusersLayout(
    ("x_embedder.", "single_transformer_blocks.0.proj_mlp.", "proj_out."),
    _DIFFUSERS,
    {
        **_NORMS,
        **{
            f"distilled_guidance_layer.norms.{i}.scale": f"distilled_guidance_layer.norms.{i}.weight"
            for i in range(_APPROXIMATOR_LAYERS)
        },
    },
)
"""That of Flux and Chroma."""


def _modules(path: str, shape: Shape) -> tuple[Module, ...]:
    ends = modules_matching(path, shape, _ENDS)
    return modules_matching(path, shape, _MODULES) or tuple(replace(m, is_end=True) for m in ends)


def _chroma_modules(path: str, shape: Shape) -> tuple[Module, ...]:
    """Returns the matrices of the blocks: a network of its own modulates them."""
    return modules_matching(path, shape, _MODULES)


def _chroma_ends(path: str, shape: Shape) -> tuple[Module, ...]:
    return modules_matching(path, shape, _CHROMA_ENDS)


def _split_modules(path: str, shape: Shape) -> tuple[SplitModule, ...]:
    return split_modules(path, shape, _DIFFUSERS)


def _family(version: str, rule: DetectionRule) -> Family:
    return Family(
        name=f"flux_{version}",
        title=f"Flux {version}",
        rule=rule,
        parts=(
            NetworkPart("text_encoder", "CLIP-L", CLIP_L, "lora_te1_", clip_text_model),
            NetworkPart("text_encoder", "T5", T5, "lora_te3_", no_modules),  # nobody trains it
            transformer_part(_modules, split_modules=_split_modules),
        ),
        vae_prefixes=VAE,
        in_a1111=False,
        half=torch.bfloat16,
        ss_base_model_version="flux1",
        modelspec_architecture=f"flux-1-{version}",
        modelspec_implementation="https://github.com/black-forest-labs/flux",
        modelspec_resolution="1024x1024",
        sd_version="Flux",
    )


_CHROMA: Final = replace(
    _family("schnell", DetectionRule((_DOUBLE, _SINGLE, _APPROXIMATOR))),
    name="chroma",
    title="Chroma",
    parts=(
        NetworkPart("text_encoder", "T5", T5, "lora_te3_", no_modules),
        transformer_part(
            _chroma_modules, split_modules=_split_modules, foreign_modules=_chroma_ends
        ),
    ),
    strains=("flash", "radiance"),
    ss_base_model_version="chroma",
    modelspec_architecture="chroma",
    modelspec_implementation="https://huggingface.co/lodestones/Chroma",
    sd_version="Unknown",
)

FAMILIES: Final = (
    Family(
        "chroma_radiance",
        "Chroma Radiance",
        DetectionRule((_APPROXIMATOR, UNET + "nerf_blocks.")),
    ),
    _CHROMA,
    _family("dev", DetectionRule((_DOUBLE, _SINGLE, _GUIDANCE))),
    _family("schnell", DetectionRule((_DOUBLE, _SINGLE), none_of=(_GUIDANCE,))),
)
