"""Stable Diffusion 3 and 3.5: a transformer of joint blocks, with or without its text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from hyper_merge.checkpoints.architectures.diffusers_layout import DiffusersLayout
from hyper_merge.checkpoints.architectures.families.shared import (
    CLIP_L,
    T5,
    VAE,
    second_encoder,
    transformer_part,
)
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

_BLOCK: Final = UNET + "joint_blocks.0.x_block."
_SECOND_ATTENTION: Final = _BLOCK + "attn2."
_NORM_OF_QUERIES: Final = _BLOCK + "attn.ln_q."
_CLIP_G: Final = "text_encoders.clip_g.transformer."  # with the projection of its pooled output
_MODULES: Final = (
    r"joint_blocks\.\d+\.(x|context)_block\.(attn2?\.(qkv|proj)|mlp\.fc[12]|adaLN_modulation\.1)"
)
# kohya's scripts (`emb_dims`) and ComfyUI know these too.
_EMBEDDERS: Final = (
    r"x_embedder\.proj|context_embedder|[ty]_embedder\.mlp\.[02]"
    r"|final_layer\.(linear|adaLN_modulation\.1)"
)
_DIFFUSERS: Final[Mapping[str, tuple[str, ...]]] = {
    "joint_blocks.#.x_block.attn.qkv": tuple(f"transformer_blocks.#.attn.to_{x}" for x in "qkv"),
    "joint_blocks.#.x_block.attn2.qkv": tuple(f"transformer_blocks.#.attn2.to_{x}" for x in "qkv"),
    "joint_blocks.#.context_block.attn.qkv": tuple(
        f"transformer_blocks.#.attn.add_{x}_proj" for x in "qkv"
    ),
    "joint_blocks.#.x_block.attn.proj": ("transformer_blocks.#.attn.to_out.0",),
    "joint_blocks.#.x_block.attn2.proj": ("transformer_blocks.#.attn2.to_out.0",),
    "joint_blocks.#.context_block.attn.proj": ("transformer_blocks.#.attn.to_add_out",),
    "joint_blocks.#.x_block.mlp.fc1": ("transformer_blocks.#.ff.net.0.proj",),
    "joint_blocks.#.x_block.mlp.fc2": ("transformer_blocks.#.ff.net.2",),
    "joint_blocks.#.context_block.mlp.fc1": ("transformer_blocks.#.ff_context.net.0.proj",),
    "joint_blocks.#.context_block.mlp.fc2": ("transformer_blocks.#.ff_context.net.2",),
    "joint_blocks.#.x_block.adaLN_modulation.1": ("transformer_blocks.#.norm1.linear",),
    # In the last block a last norm: nothing of the text comes after it.
    "joint_blocks.#.context_block.adaLN_modulation.1": (
        "transformer_blocks.#.norm1_context.linear",
    ),
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}

LAYOUT_IN_DIFFUSERS: Final = DiffusersLayout(
    ("pos_embed.proj.", "transformer_blocks.0.attn.add_q_proj.", "proj_out."),
    _DIFFUSERS,
    {
        f"joint_blocks.#.{stored}.ln_{x}.weight": f"transformer_blocks.#.{name}_{x}.weight"
        for stored, name in (
            ("x_block.attn", "attn.norm"),
            ("context_block.attn", "attn.norm_added"),
            ("x_block.attn2", "attn2.norm"),
        )
        for x in "qk"
    }
    | {"pos_embed": "pos_embed.pos_embed"},
)


def _modules(path: str, shape: Shape) -> tuple[Module, ...]:
    return modules_matching(path, shape, _MODULES)


def _embedders(path: str, shape: Shape) -> tuple[Module, ...]:
    return modules_matching(path, shape, _EMBEDDERS)


def _split_modules(path: str, shape: Shape) -> tuple[SplitModule, ...]:
    return split_modules(path, shape, _DIFFUSERS)


def _clip_g(path: str, shape: Shape) -> tuple[Module, ...]:
    return clip_text_model(path.removeprefix("text_model."), shape)


def _family(name: str, title: str, model_type: str, rule: DetectionRule) -> Family:
    return Family(
        name=name,
        title=f"Stable Diffusion {title}",
        rule=rule,
        parts=(
            NetworkPart("text_encoder", "CLIP-L", CLIP_L, "lora_te1_", clip_text_model),
            NetworkPart("text_encoder", "CLIP-G", _CLIP_G, "lora_te2_", _clip_g, second_encoder),
            NetworkPart("text_encoder", "T5", T5, "lora_te3_", no_modules),  # nobody trains it
            transformer_part(_modules, split_modules=_split_modules, foreign_modules=_embedders),
        ),
        vae_prefixes=VAE,
        ss_base_model_version=model_type,
        modelspec_architecture=f"stable-diffusion-3-{model_type}",
        modelspec_implementation="https://github.com/Stability-AI/generative-models",
        modelspec_resolution="1024x1024",
        sd_version="Unknown",  # hosts have no word for it, and show such LoRAs always
        lora_alpha=False,  # A1111 refuses a whole SD 3 LoRA for one alpha
    )


FAMILIES: Final = (
    _family("sd35_medium", "3.5 medium", "5-medium", DetectionRule((_BLOCK, _SECOND_ATTENTION))),
    _family("sd35_large", "3.5 large", "5-large", DetectionRule((_BLOCK, _NORM_OF_QUERIES))),
    _family("sd3_medium", "3 medium", "medium", DetectionRule((_BLOCK,))),
)
