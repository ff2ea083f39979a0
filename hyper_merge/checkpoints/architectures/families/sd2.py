"""Stable Diffusion 2.x: an OpenCLIP text encoder, and for the same keys two kinds of prediction."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from hyper_merge.checkpoints.architectures.families.shared import INPAINTING, VAE
from hyper_merge.checkpoints.architectures.families.v_prediction_configs import sd2_v
from hyper_merge.checkpoints.architectures.lora_modules import Module, open_clip, unet_with_matrices
from hyper_merge.checkpoints.architectures.positions import positions_on_four_levels
from hyper_merge.checkpoints.architectures.signatures import LABELS, UNET
from hyper_merge.checkpoints.architectures.spec import DetectionRule, Family, NetworkPart
from hyper_merge.checkpoints.io.header import Shape

_OPEN_CLIP: Final = "cond_stage_model.model."
_DEPTH: Final = 5  # latent, depth
_UPSCALER: Final = 7  # latent, image
# The UNet reads the 23rd layer's output: the 24th never runs, files saved by kohya's scripts hold a
# copy of the 23rd there, and loaders that build 23 layers drop a LoRA with modules of the 24th.
_LAYERS: Final = 23
# Nor is the pooled output read. Files saved by other tools lack these, or hold anything there.
_IDLE: Final = (f"{_OPEN_CLIP}transformer.resblocks.{_LAYERS}.", f"{_OPEN_CLIP}text_projection")


def _text_modules(path: str, shape: Shape) -> tuple[Module, ...]:
    return open_clip(path, shape, layers=_LAYERS)


_RULE: Final = DetectionRule(
    none_of=(LABELS,), depths=(1, 1, 1, 0, 1), input_channels=4, texts=(_OPEN_CLIP,), context=1024
)

SD2: Final = Family(
    name="sd2",
    title="Stable Diffusion 2.x",
    rule=_RULE,
    parts=(
        NetworkPart(
            "text_encoder",
            "text encoder",
            _OPEN_CLIP,
            "lora_te_",
            _text_modules,
        ),
        NetworkPart(
            "unet",
            "UNet",
            UNET,
            "lora_unet_",
            unet_with_matrices,
            positions=positions_on_four_levels,
        ),
    ),
    vae_prefixes=VAE,
    idle=_IDLE,
    ss_base_model_version="sd_v2",
    ss_v2="True",
    modelspec_architecture="stable-diffusion-v2-512",
    modelspec_implementation="diffusers",
    modelspec_resolution="512x512",
    modelspec_prediction_type="epsilon",
    sd_version="SD2",
    v_metadata=(
        ("ss_base_model_version", "sd_v2_v"),
        ("modelspec_architecture", "stable-diffusion-v2-768-v"),
        ("modelspec_resolution", "768x768"),
        ("modelspec_prediction_type", "v"),
    ),
    v_configuration=sd2_v,
    v_spread=UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias",
)


def _variant(name: str, input_channels: int) -> Family:
    return replace(
        SD2,
        name=f"sd2_{name}",
        title=f"Stable Diffusion 2.x {name}",
        rule=replace(_RULE, input_channels=input_channels),
        v_metadata=(),
    )


FAMILIES: Final = (
    Family(
        "sd2_unclip",
        "Stable Diffusion 2.x unCLIP",
        DetectionRule(all_of=(LABELS,), texts=(_OPEN_CLIP, "embedder."), depths=(1, 1, 1, 0, 1)),
    ),
    SD2,
    _variant("inpainting", INPAINTING),
    _variant("depth", _DEPTH),
    Family(
        "sd2_upscaler",
        "Stable Diffusion x4 upscaler",
        DetectionRule(texts=(_OPEN_CLIP,), input_channels=_UPSCALER),
    ),
    Family(
        "sd2_pruned",
        "pruned Stable Diffusion 2.x",
        DetectionRule(texts=(_OPEN_CLIP,), input_channels=4),
    ),
)
