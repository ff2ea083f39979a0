"""Stable Diffusion XL with two text encoders, its variants, and its refiner with the second alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from hyper_merge.checkpoints.architectures.families.shared import (
    INPAINTING,
    PIX2PIX,
    VAE,
    second_encoder,
)
from hyper_merge.checkpoints.architectures.families.v_prediction_configs import sdxl_v
from hyper_merge.checkpoints.architectures.lora_modules import (
    clip_text_model,
    no_modules,
    open_clip,
    unet_as_stored,
)
from hyper_merge.checkpoints.architectures.positions import (
    positions_on_four_levels,
    positions_on_three_levels,
)
from hyper_merge.checkpoints.architectures.signatures import LABELS, UNET
from hyper_merge.checkpoints.architectures.spec import DetectionRule, Family, NetworkPart

_CLIP: Final = "conditioner.embedders.0.transformer.text_model."
_OPEN_CLIP: Final = "conditioner.embedders.1.model."
_REFINERS: Final = "conditioner.embedders.0.model."
_RULE: Final = DetectionRule(
    all_of=(LABELS,), depths=(0, 2, 10, 10), input_channels=4, texts=(_OPEN_CLIP,), context=2048
)
_UNET: Final = NetworkPart(
    "unet", "UNet", UNET, "lora_unet_", unet_as_stored, positions=positions_on_three_levels
)

SDXL: Final = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    rule=_RULE,
    parts=(
        NetworkPart("text_encoder", "first text encoder", _CLIP, "lora_te1_", clip_text_model),
        NetworkPart(
            "text_encoder",
            "second text encoder",
            _OPEN_CLIP,
            "lora_te2_",
            open_clip,
            second_encoder,
        ),
        _UNET,
    ),
    vae_prefixes=VAE,
    ss_base_model_version="sdxl_base_v1-0",
    modelspec_architecture="stable-diffusion-xl-v1-base",
    modelspec_implementation="https://github.com/Stability-AI/generative-models",
    modelspec_resolution="1024x1024",
    modelspec_prediction_type="epsilon",
    sd_version="SDXL",
    v_metadata=(("modelspec_prediction_type", "v"),),
    v_configuration=sdxl_v,
)


def _variant(name: str, title: str, input_channels: int) -> Family:
    rule = replace(_RULE, input_channels=input_channels)
    title = f"Stable Diffusion XL {title}"
    return replace(SDXL, name=f"sdxl_{name}", title=title, rule=rule, v_metadata=())


def _edm(name: str, noise: str, marker: str) -> Family:
    """Returns a family that was trained for other noise; hosts know it by a marker among the keys."""
    return replace(
        SDXL,
        name=f"sdxl_{name}",
        title=f"Stable Diffusion XL with {noise}",
        rule=replace(_RULE, all_of=(LABELS, marker)),
        modelspec_prediction_type="",
        v_metadata=(),
    )


FAMILIES: Final = (
    _edm("edm", "EDM noise (Playground 2.5)", "edm_mean"),
    _edm("edm_v", "EDM noise and v-prediction (CosXL)", "edm_vpred.sigma_max"),
    SDXL,
    _variant("inpainting", "inpainting", INPAINTING),
    _variant("pix2pix", "instruct-pix2pix", PIX2PIX),
    replace(
        SDXL,
        name="sdxl_refiner",
        title="Stable Diffusion XL refiner",
        rule=DetectionRule((LABELS,), (), (0, 4, 4, 0, 4), 4, texts=(_REFINERS,), context=1280),
        # A1111 knows no LoRA names for its text encoder.
        parts=(
            NetworkPart("text_encoder", "text encoder", _REFINERS, "lora_te_", no_modules),
            replace(_UNET, positions=positions_on_four_levels),
        ),
        modelspec_architecture="stable-diffusion-xl-v1-refiner",
        v_metadata=(),
    ),
    Family(
        "sdxl_pruned",
        "pruned Stable Diffusion XL (such as SSD-1B)",
        DetectionRule(texts=(_OPEN_CLIP,), input_channels=4, context=2048),
    ),
)
