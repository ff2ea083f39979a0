"""Keys and shapes of whole checkpoints of SD 3, Flux and the SDXL refiner; no tensors."""

from __future__ import annotations

from hyper_merge.checkpoints.io.header import Shape
from hyper_merge.synthetic.checkpoint_layouts import UNET_PREFIX, VAE_PREFIX, under
from hyper_merge.synthetic.mmdit_layouts import (
    FluxShape,
    JointShape,
    flux_transformer,
    joint_transformer,
    t5,
)
from hyper_merge.synthetic.network_layouts import (
    UNetShape,
    clip_layout,
    open_clip_layout,
    unet_layout,
    vae_layout,
)

REFINER_TEXT_PREFIX = "conditioner.embedders.0.model."
_SCORES = 5 * 256  # of the refiner's


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
        **under(REFINER_TEXT_PREFIX, open_clip_layout(context, 32, vocabulary)),
        **under(UNET_PREFIX, unet_layout(shape)),
        **under(VAE_PREFIX, vae_layout(vae_width)),
    }


def sd3_layout(shape: JointShape | None = None, vae_width: int = 128) -> dict[str, Shape]:
    """Returns the transformer and VAE of an SD 3 or 3.5 checkpoint, without text encoders."""
    return {
        **under(UNET_PREFIX, joint_transformer(shape or JointShape())),
        **under(VAE_PREFIX, vae_layout(vae_width, 16, quantised=False)),
    }


def flux_layout(shape: FluxShape | None = None) -> dict[str, Shape]:
    """Returns the transformer of Flux alone, with the usual prefix."""
    return under(UNET_PREFIX, flux_transformer(shape or FluxShape()))


def text_encoders_layout(
    clip_l: int = 768, clip_g: int = 0, t5_width: int = 0, vocabulary: int = 49408
) -> dict[str, Shape]:
    """Returns the text encoders of an SD 3 or Flux checkpoint; a width of 0 leaves one out."""
    start = "text_encoders."
    return {
        **under(f"{start}clip_l.transformer.text_model.", clip_layout(clip_l, 12, vocabulary)),
        **(
            {
                **under(
                    f"{start}clip_g.transformer.text_model.", clip_layout(clip_g, 32, vocabulary)
                ),
                f"{start}clip_g.transformer.text_projection.weight": (clip_g, clip_g),
            }
            if clip_g
            else {}
        ),
        **(under(f"{start}t5xxl.transformer.", t5(t5_width, 24, vocabulary)) if t5_width else {}),
    }
