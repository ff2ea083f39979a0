"""Keys and shapes of whole checkpoints, from the architectures' hyper-parameters; no tensors.

For tests, benchmarks and demonstrations: a narrow layout has the same keys as the real thing.
"""

from __future__ import annotations

from collections.abc import Iterable

from hyper_merge.checkpoints.io.header import Shape
from hyper_merge.synthetic.network_layouts import (
    Entry,
    UNetShape,
    clip_layout,
    open_clip_layout,
    unet_layout,
    vae_layout,
)

UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIX = "cond_stage_model.transformer.text_model."
OPEN_CLIP_PREFIX = "cond_stage_model.model."
FIRST_TEXT_PREFIX = "conditioner.embedders.0.transformer.text_model."
SECOND_TEXT_PREFIX = "conditioner.embedders.1.model."
VAE_PREFIX = "first_stage_model."

_SIZES = 6 * 256  # of SDXL's vector: height, width, crop and target size


def sd1_layout(
    width: int = 320,
    context: int = 768,
    vocabulary: int = 49408,
    vae_width: int = 128,
    input_channels: int = 4,
) -> dict[str, Shape]:
    """Returns every key of an SD 1.x checkpoint with its shape, in the network's order.

    At the defaults this is the real layout: UNet 686 keys, text encoder 197, VAE 248; there are no
    schedules. The only
    tensor that is not floating point is `...embeddings.position_ids` (int64).

    Args:
        width: channels of the UNet's first level; the time embedding has four times as many.
        context: width of the text encoder, read by the UNet's cross-attention.
        vocabulary: tokens known to the text encoder.
        vae_width: channels of the VAE's first level.
        input_channels: that the UNet reads; inpainting 9, instruct-pix2pix 8.

    Returns:
        Full key (with the checkpoint's prefixes) to shape.
    """
    return {
        **under(TEXT_PREFIX, clip_layout(context, 12, vocabulary)),
        **under(UNET_PREFIX, unet_layout(UNetShape(width, context, input_channels=input_channels))),
        **under(VAE_PREFIX, vae_layout(vae_width)),
    }


def sd2_layout(
    width: int = 320,
    context: int = 1024,
    vocabulary: int = 49408,
    vae_width: int = 128,
    input_channels: int = 4,
) -> dict[str, Shape]:
    """Returns every key of an SD 2.x checkpoint; arguments and result as for `sd1_layout`."""
    shape = UNetShape(width, context, input_channels=input_channels, matrices=True)
    return {
        **under(OPEN_CLIP_PREFIX, open_clip_layout(context, 24, vocabulary)),
        **under(UNET_PREFIX, unet_layout(shape)),
        **under(VAE_PREFIX, vae_layout(vae_width)),
    }


def sdxl_layout(
    width: int = 320,
    contexts: tuple[int, int] = (768, 1280),
    vocabulary: int = 49408,
    vae_width: int = 128,
    input_channels: int = 4,
) -> dict[str, Shape]:
    """Returns every key of an SDXL checkpoint; `contexts` are the widths of its two text encoders."""
    shape = UNetShape(
        width,
        sum(contexts),
        multiples=(1, 2, 4),
        depths=(0, 2, 10),
        middle=10,
        input_channels=input_channels,
        matrices=True,
        labels=contexts[1] + _SIZES,
    )
    return {
        **under(FIRST_TEXT_PREFIX, clip_layout(contexts[0], 12, vocabulary)),
        **under(SECOND_TEXT_PREFIX, open_clip_layout(contexts[1], 32, vocabulary)),
        **under(UNET_PREFIX, unet_layout(shape)),
        **under(VAE_PREFIX, vae_layout(vae_width)),
    }


def under(prefix: str, entries: Iterable[Entry]) -> dict[str, Shape]:
    """Returns the entries with a prefix before each key."""
    return {prefix + key: shape for key, shape in entries}
