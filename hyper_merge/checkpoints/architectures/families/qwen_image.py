"""Qwen-Image and Qwen-Image-Edit: a transformer of blocks with one stream of pixels and one of text."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from hyper_merge.checkpoints.architectures.families.shared import VAE, transformer_part
from hyper_merge.checkpoints.architectures.lora_modules import Module, modules_matching
from hyper_merge.checkpoints.architectures.signatures import UNET
from hyper_merge.checkpoints.architectures.spec import DetectionRule, Family
from hyper_merge.checkpoints.io.header import Shape

_BLOCK: Final = UNET + "transformer_blocks.0.attn.add_q_proj."
_NORM: Final = UNET + "txt_norm."
_MODULES: Final = (
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
    r"|(img|txt)_(mlp\.net\.(0\.proj|2)|mod\.1))"
)


_ENDS: Final = (
    r"(img|txt)_in|time_text_embed\.timestep_embedder\.linear_[12]|norm_out\.linear|proj_out"
)


def _ends(path: str, shape: Shape) -> tuple[Module, ...]:
    return modules_matching(path, shape, _ENDS)


def _modules(path: str, shape: Shape) -> tuple[Module, ...]:
    return modules_matching(path, shape, _MODULES)


QWEN_IMAGE: Final = Family(
    name="qwen_image",
    title="Qwen-Image",
    rule=DetectionRule((_BLOCK, _NORM)),
    parts=(transformer_part(_modules, foreign_modules=_ends),),
    vae_prefixes=VAE,
    strains=("edit", "lightning", "rapid"),
    in_a1111=False,
    half=torch.bfloat16,
    ss_base_model_version="qwen_image",
    modelspec_architecture="Qwen-Image",
    modelspec_implementation="https://github.com/QwenLM/Qwen-Image",
    modelspec_resolution="1024x1024",
    sd_version="Unknown",
)

# By a marker among its keys; earlier ones look like the family that makes pictures from text alone.
EDIT_2511: Final = replace(
    QWEN_IMAGE,
    name="qwen_image_edit_2511",
    title="Qwen-Image-Edit 2511",
    rule=DetectionRule((_BLOCK, _NORM, UNET + "__index_timestep_zero__")),
    strains=("lightning", "rapid"),
    modelspec_architecture="Qwen-Image-Edit-2511",
)

FAMILIES: Final = (
    Family(
        "qwen_image_layered",
        "Qwen-Image-Layered",
        DetectionRule((_BLOCK, UNET + "time_text_embed.addition_t_embedding.")),
    ),
    EDIT_2511,
    QWEN_IMAGE,
)
