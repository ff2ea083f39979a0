"""Stable Diffusion 1.x and its variants, which differ in the channels that the UNet reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from hyper_merge.checkpoints.architectures.families.shared import INPAINTING, PIX2PIX, VAE
from hyper_merge.checkpoints.architectures.lora_modules import (
    clip_text_model,
    unet_with_convolutions,
)
from hyper_merge.checkpoints.architectures.positions import positions_on_four_levels
from hyper_merge.checkpoints.architectures.signatures import LABELS, UNET
from hyper_merge.checkpoints.architectures.spec import DetectionRule, Family, NetworkPart

_CLIP: Final = "cond_stage_model.transformer.text_model."
_RULE: Final = DetectionRule(
    none_of=(LABELS,), depths=(1, 1, 1, 0, 1), input_channels=4, texts=(_CLIP,), context=768
)

SD1: Final = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    rule=_RULE,
    parts=(
        NetworkPart("text_encoder", "text encoder", _CLIP, "lora_te_", clip_text_model),
        NetworkPart(
            "unet",
            "UNet",
            UNET,
            "lora_unet_",
            unet_with_convolutions,
            positions=positions_on_four_levels,
        ),
    ),
    vae_prefixes=VAE,
    ss_base_model_version="sd_v1",
    modelspec_architecture="stable-diffusion-v1",
    modelspec_implementation="diffusers",
    modelspec_resolution="512x512",
    modelspec_prediction_type="epsilon",
    sd_version="SD1",
)


def _variant(name: str, title: str, input_channels: int) -> Family:
    rule = replace(_RULE, input_channels=input_channels)
    return replace(SD1, name=f"sd1_{name}", title=f"Stable Diffusion 1.x {title}", rule=rule)


FAMILIES: Final = (
    Family("alt_diffusion", "AltDiffusion", DetectionRule(texts=("cond_stage_model.roberta.",))),
    SD1,
    _variant("inpainting", "inpainting", INPAINTING),
    _variant("pix2pix", "instruct-pix2pix", PIX2PIX),
    Family(
        "sd1_pruned", "pruned Stable Diffusion 1.x", DetectionRule(texts=(_CLIP,), input_channels=4)
    ),
)
