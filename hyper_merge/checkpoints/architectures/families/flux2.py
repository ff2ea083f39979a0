"""Flux.2 (dev, klein): Flux's double and single blocks with one modulation for all of a kind."""

from __future__ import annotations

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

_DOUBLE: Final = UNET + "double_blocks.0.img_attn.norm.key_norm."
_MODULATION: Final = UNET + "double_stream_modulation_img.lin."
_GUIDANCE: Final = UNET + "guidance_in."
_MODULES: Final = (
    r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])"
    r"|single_blocks\.\d+\.linear[12]"
    r"|double_stream_modulation_(img|txt)\.lin|single_stream_modulation\.lin"
)
_ENDS: Final = (
    r"(img|txt)_in|(time|guidance)_in\.(in|out)_layer|final_layer\.(linear|adaLN_modulation\.1)"
)
_DIFFUSERS: Final[Mapping[str, tuple[str, ...]]] = {
    "double_blocks.#.img_attn.qkv": tuple(f"transformer_blocks.#.attn.to_{x}" for x in "qkv"),
    "double_blocks.#.txt_attn.qkv": tuple(f"transformer_blocks.#.attn.add_{x}_proj" for x in "qkv"),
    "double_blocks.#.img_attn.proj": ("transformer_blocks.#.attn.to_out.0",),
    "double_blocks.#.txt_attn.proj": ("transformer_blocks.#.attn.to_add_out",),
    "double_blocks.#.img_mlp.0": ("transformer_blocks.#.ff.linear_in",),
    "double_blocks.#.img_mlp.2": ("transformer_blocks.#.ff.linear_out",),
    "double_blocks.#.txt_mlp.0": ("transformer_blocks.#.ff_context.linear_in",),
    "double_blocks.#.txt_mlp.2": ("transformer_blocks.#.ff_context.linear_out",),
    "single_blocks.#.linear1": ("single_transformer_blocks.#.attn.to_qkv_mlp_proj",),
    "single_blocks.#.linear2": ("single_transformer_blocks.#.attn.to_out",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}

LAYOUT_IN_DIFFUSERS: Final = DiffusersLayout(
    ("x_embedder.", "single_transformer_blocks.0.attn.to_qkv_mlp_proj.", "proj_out."),
    _DIFFUSERS,
    {
        f"{stored}.{which}_norm.scale": f"{name}_{which[0]}.weight"
        for stored, name in (
            ("double_blocks.#.img_attn.norm", "transformer_blocks.#.attn.norm"),
            ("double_blocks.#.txt_attn.norm", "transformer_blocks.#.attn.norm_added"),
            ("single_blocks.#.norm", "single_transformer_blocks.#.attn.norm"),
        )
        for which in ("query", "key")
    },
)


def _modules(path: str, shape: Shape) -> tuple[Module, ...]:
    return modules_matching(path, shape, _MODULES)


def _ends(path: str, shape: Shape) -> tuple[Module, ...]:
    return modules_matching(path, shape, _ENDS)


def _split_modules(path: str, shape: Shape) -> tuple[SplitModule, ...]:
    return split_modules(path, shape, _DIFFUSERS)


KLEIN: Final = Family(
    name="flux2_klein",
    title="Flux.2 klein",
    rule=DetectionRule((_DOUBLE, _MODULATION), none_of=(_GUIDANCE,)),
    parts=(transformer_part(_modules, NATIVE, _split_modules, _ends),),
    vae_prefixes=VAE,
    lora_alpha=False,  # diffusers refuses a file with any
    lora_spelling=PEFT,
    strains=("base",),  # of which the others were distilled
    in_a1111=False,
    half=torch.bfloat16,
    ss_base_model_version="flux2",
    modelspec_architecture="Flux.2-klein",
    modelspec_implementation="https://github.com/black-forest-labs/flux2",
    modelspec_resolution="1024x1024",
    sd_version="Unknown",
)

DEV: Final = replace(
    KLEIN,
    name="flux2_dev",
    title="Flux.2 dev",
    rule=DetectionRule((_DOUBLE, _MODULATION, _GUIDANCE)),
    strains=(),
    modelspec_architecture="Flux.2-dev",
)

FAMILIES: Final = (DEV, KLEIN)
