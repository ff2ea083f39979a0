"""The table of known architectures; the first entry that matches a file's structure is its family.

Support for one is its `parts` and words here, and a rule in `module_names` if its names are new.
"""

from __future__ import annotations

from typing import Final

from hyper_merge.checkpoints.architecture import Family, Part, Signs
from hyper_merge.checkpoints.module_names import clip_text_model, unet_with_convolutions
from hyper_merge.checkpoints.structure import UNET

_CLIP: Final = "cond_stage_model.transformer.text_model."
# Checkpoints of 2022 that older tools saved lack "text_model.".
_OLD_CLIP: Final = (
    "cond_stage_model.transformer.encoder.layers.",
    "cond_stage_model.transformer.embeddings.",
)
_OPEN_CLIP: Final = ("cond_stage_model.model.", "conditioner.embedders.0.model.")
_XL: Final = ("conditioner.embedders.1.model.",)
_INPAINTING: Final = 9  # latent, masked latent, mask
_PIX2PIX: Final = 8  # latent, source latent
_DEPTH: Final = 5
_UPSCALER: Final = 7


SD1: Final = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    signs=Signs((_CLIP,), input_channels=4),
    supported=True,
    parts=(
        Part("text_encoder", _CLIP, "lora_te_", clip_text_model),
        Part("unet", UNET, "lora_unet_", unet_with_convolutions),
    ),
    vae_prefixes=tuple(
        "first_stage_model." + part
        for part in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    ),
    ss_base_model_version="sd_v1",
    modelspec_architecture="stable-diffusion-v1",
    modelspec_implementation="diffusers",
    modelspec_resolution="512x512",
    modelspec_prediction_type="epsilon",
    sd_version="SD1",
)

FAMILIES: Final[tuple[Family, ...]] = (
    Family("sd3", "Stable Diffusion 3", Signs((UNET + "joint_blocks.", "joint_blocks."))),
    Family("flux", "Flux", Signs((UNET + "double_blocks.", "double_blocks."))),
    Family(
        "sdxl_pruned",
        "pruned Stable Diffusion XL (such as SSD-1B)",
        Signs(_XL, input_channels=4, pruned=True),
    ),
    Family("sdxl", "Stable Diffusion XL", Signs(_XL, input_channels=4)),
    Family(
        "sdxl_inpainting",
        "Stable Diffusion XL inpainting",
        Signs(_XL, input_channels=_INPAINTING),
    ),
    Family(
        "sdxl_pix2pix",
        "Stable Diffusion XL instruct-pix2pix",
        Signs(_XL, input_channels=_PIX2PIX),
    ),
    Family(
        "sdxl_refiner",
        "Stable Diffusion XL refiner",
        Signs(("conditioner.embedders.0.model.",), input_channels=4, label_embedding=True),
    ),
    Family(
        "sd2_unclip",
        "Stable Diffusion 2.x unCLIP",
        Signs(_OPEN_CLIP, input_channels=4, label_embedding=True),
    ),
    Family("sd2", "Stable Diffusion 2.x", Signs(_OPEN_CLIP, input_channels=4)),
    Family(
        "sd2_inpainting",
        "Stable Diffusion 2.x inpainting",
        Signs(_OPEN_CLIP, input_channels=_INPAINTING),
    ),
    Family("sd2_depth", "Stable Diffusion 2.x depth", Signs(_OPEN_CLIP, input_channels=_DEPTH)),
    Family(
        "sd2_upscaler",
        "Stable Diffusion x4 upscaler",
        Signs(_OPEN_CLIP, input_channels=_UPSCALER),
    ),
    Family("alt_diffusion", "AltDiffusion", Signs(("cond_stage_model.roberta.",))),
    Family(
        "sd1_pruned",
        "pruned Stable Diffusion 1.x",
        Signs((_CLIP, *_OLD_CLIP), input_channels=4, pruned=True),
    ),
    SD1,
    Family(
        "sd1_old_keys",
        "Stable Diffusion 1.x (old text-encoder keys without 'text_model.')",
        Signs(_OLD_CLIP, input_channels=4),
    ),
    Family(
        "sd1_inpainting",
        "Stable Diffusion 1.x inpainting",
        Signs((_CLIP, *_OLD_CLIP), input_channels=_INPAINTING),
    ),
    Family(
        "sd1_pix2pix",
        "Stable Diffusion 1.x instruct-pix2pix",
        Signs((_CLIP, *_OLD_CLIP), input_channels=_PIX2PIX),
    ),
)
