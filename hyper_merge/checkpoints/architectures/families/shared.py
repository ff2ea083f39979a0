"""Prefixes, numbers and functions that several families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hyper_merge.checkpoints.architectures.lora_modules import Module, no_modules
from hyper_merge.checkpoints.architectures.positions import transformer_positions
from hyper_merge.checkpoints.architectures.sections import section_of
from hyper_merge.checkpoints.architectures.signatures import UNET
from hyper_merge.checkpoints.architectures.spec import NetworkPart
from hyper_merge.checkpoints.architectures.split_modules import SplitModule, no_split_modules
from hyper_merge.checkpoints.io.header import Shape

INPAINTING: Final = 9
"""Channels that an inpainting UNet reads: latent, masked latent, mask."""

PIX2PIX: Final = 8
"""Channels that an instruct-pix2pix UNet reads: latent, source latent."""

VAE: Final = tuple(
    prefix + part
    for prefix in ("first_stage_model.", "vae.")
    for part in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
)
"""Keys of the VAE begin with one of these."""

CLIP_L: Final = "text_encoders.clip_l.transformer.text_model."
T5: Final = "text_encoders.t5xxl.transformer."
"""Prefixes of the text encoders that stand in one file with a transformer."""


NATIVE: Final = "diffusion_model."
"""Prefix of the modules in LoRA files that keep the checkpoint's own names."""


def second_encoder(path: str) -> str:
    """Returns the section of a layer in the second of two text encoders."""
    return section_of(path, encoder="TE2.")


def transformer_part(
    modules: Callable[[str, Shape], tuple[Module, ...]],
    lora_prefix: str = "lora_unet_",
    split_modules: Callable[[str, Shape], tuple[SplitModule, ...]] = no_split_modules,
    foreign_modules: Callable[[str, Shape], tuple[Module, ...]] = no_modules,
) -> NetworkPart:
    """Returns the denoiser of a family that is a transformer of patches.

    Args:
        modules: names the modules of a tensor, see `NetworkPart`.
        lora_prefix: of its modules' names in a LoRA file.
        split_modules: names those that diffusers has instead, see `NetworkPart`.
        foreign_modules: names those that only other programs' LoRAs have, see `NetworkPart`.
    """
    return NetworkPart(
        "unet",
        "transformer",
        UNET,
        lora_prefix,
        modules,
        positions=transformer_positions,
        split_modules=split_modules,
        foreign_modules=foreign_modules,
    )
