"""Keys and shapes of whole checkpoints, from the architectures' hyper-parameters; no tensors.

For tests, benchmarks and demonstrations: a narrow layout has the same keys as the real thing.
"""

from __future__ import annotations

from collections.abc import Iterable

from hyper_merge.checkpoints.io.header import Shape
from hyper_merge.synthetic.mmdit_layouts import (
    FluxShape,
    JointShape,
    flux_transformer,
    joint_transformer,
    t5,
)
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
REFINER_TEXT_PREFIX = "conditioner.embedders.0.model."
VAE_PREFIX = "first_stage_model."

_SIZES = 6 * 256  # of SDXL's vector: height, width, crop and target size
_SCORES = 5 * 256  # of the refiner's


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
        **_under(TEXT_PREFIX, clip_layout(context, 12, vocabulary)),
        **_under(
            UNET_PREFIX, unet_layout(UNetShape(width, context, input_channels=input_channels))
        ),
        **_under(VAE_PREFIX, vae_layout(vae_width)),
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
        **_under(OPEN_CLIP_PREFIX, open_clip_layout(context, 24, vocabulary)),
        **_under(UNET_PREFIX, unet_layout(shape)),
        **_under(VAE_PREFIX, vae_layout(vae_width)),
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
        **_under(FIRST_TEXT_PREFIX, clip_layout(contexts[0], 12, vocabulary)),
        **_under(SECOND_TEXT_PREFIX, open_clip_layout(contexts[1], 32, vocabulary)),
        **_under(UNET_PREFIX, unet_layout(shape)),
        **_under(VAE_PREFIX, vae_layout(vae_width)),
    }


def refiner_layout(
    width: int = 384, context: int = 1280, vocabulary: int = 49408, vae_width: int = 128
) -> dict[str, Shape]:
    """Returns every key of an SDXL refiner checkpoint; arguments and result as for `sd1_layout`."""
    shape = UNetShape(
        width,
        context,
        depths=(0, 4, 4, 0),
        middle=4,
        matrices=True,
        labels=context + _SCORES,
    )
    return {
        **_under(REFINER_TEXT_PREFIX, open_clip_layout(context, 32, vocabulary)),
        **_under(UNET_PREFIX, unet_layout(shape)),
        **_under(VAE_PREFIX, vae_layout(vae_width)),
    }


def sd3_layout(shape: JointShape | None = None, vae_width: int = 128) -> dict[str, Shape]:
    """Returns the transformer and VAE of an SD 3 or 3.5 checkpoint, without text encoders."""
    return {
        **_under(UNET_PREFIX, joint_transformer(shape or JointShape())),
        **_under(VAE_PREFIX, vae_layout(vae_width, 16, quantised=False)),
    }


def flux_layout(shape: FluxShape | None = None) -> dict[str, Shape]:
    """Returns the transformer of Flux alone, with the usual prefix."""
    return _under(UNET_PREFIX, flux_transformer(shape or FluxShape()))


def text_encoders_layout(
    clip_l: int = 768, clip_g: int = 0, t5_width: int = 0, vocabulary: int = 49408
) -> dict[str, Shape]:
    """Returns the text encoders of an SD 3 or Flux checkpoint; a width of 0 leaves one out."""
    start = "text_encoders."
    return {
        **_under(f"{start}clip_l.transformer.text_model.", clip_layout(clip_l, 12, vocabulary)),
        **(
            {
                **_under(
                    f"{start}clip_g.transformer.text_model.", clip_layout(clip_g, 32, vocabulary)
                ),
                f"{start}clip_g.transformer.text_projection.weight": (clip_g, clip_g),
            }
            if clip_g
            else {}
        ),
        **(_under(f"{start}t5xxl.transformer.", t5(t5_width, 24, vocabulary)) if t5_width else {}),
    }


def _under(prefix: str, entries: Iterable[Entry]) -> dict[str, Shape]:
    return {prefix + key: shape for key, shape in entries}
