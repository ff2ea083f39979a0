"""The networks of checkpoints by diffusers and transformers, and narrow random weights for them."""

import warnings
from functools import cache
from pathlib import Path

import torch
from random_checkpoints import sane_weights
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from hyper_merge.calibration.text_encoders import TextEncoder
from hyper_merge.calibration.unet import UNet
from hyper_merge.checkpoints.architectures.families.sd1 import SD1
from hyper_merge.checkpoints.architectures.families.sd2 import SD2
from hyper_merge.checkpoints.architectures.families.sdxl import FAMILIES, SDXL
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.checkpoints.io.header import Header, TensorInfo
from hyper_merge.synthetic.checkpoint_layouts import (
    FIRST_TEXT_PREFIX,
    OPEN_CLIP_PREFIX,
    SECOND_TEXT_PREFIX,
    TEXT_PREFIX,
    UNET_PREFIX,
)
from hyper_merge.synthetic.family_layouts import REFINER_TEXT_PREFIX
from hyper_merge.synthetic.network_layouts import (
    UNetShape,
    clip_layout,
    open_clip_layout,
    unet_layout,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the library, on being imported
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import (
        convert_ldm_unet_checkpoint,
        convert_open_clip_checkpoint,
    )

REFINER = next(family for family in FAMILIES if family.name == "sdxl_refiner")
VOCABULARY = 20
WIDE, WIDER = 64, 128  # of text encoders, so that one has two heads

UNETS = {
    # of two levels in place of four: cheap
    "small": UNetShape(32, WIDE, multiples=(1, 2), depths=(1, 1)),
    "sd1": UNetShape(32, WIDE),
    "sd1_inpainting": UNetShape(32, WIDE, input_channels=9),
    "sd2": UNetShape(32, WIDER, matrices=True),
    "sdxl": UNetShape(
        32,
        WIDE + WIDER,
        multiples=(1, 2, 4),
        depths=(0, 1, 2),
        middle=2,
        matrices=True,
        labels=WIDER + 6 * 256,
    ),
    "sdxl_refiner": UNetShape(
        32, WIDER, depths=(0, 1, 1, 0), matrices=True, labels=WIDER + 5 * 256
    ),
}
FAMILY = {
    "small": SD1,
    "sd1": SD1,
    "sd1_inpainting": SD1,
    "sd2": SD2,
    "sdxl": SDXL,
    "sdxl_refiner": REFINER,
}
CLIPS = {
    "small": TEXT_PREFIX,
    "sd1": TEXT_PREFIX,
    "sd1_inpainting": TEXT_PREFIX,
    "sdxl": FIRST_TEXT_PREFIX,
}
OPEN_CLIPS = {
    "sd2": OPEN_CLIP_PREFIX,
    "sdxl": SECOND_TEXT_PREFIX,
    "sdxl_refiner": REFINER_TEXT_PREFIX,
}


def narrow_shapes(kind):
    """Returns the UNet and the text encoders of a family, with few and narrow layers.

    SD 2 has its 24 layers: their number says which one is idle.
    """
    shapes = {UNET_PREFIX + key: shape for key, shape in unet_layout(UNETS[kind])}
    if prefix := CLIPS.get(kind):
        shapes |= {prefix + key: shape for key, shape in clip_layout(WIDE, 3, VOCABULARY)}
    if prefix := OPEN_CLIPS.get(kind):
        layers = 24 if kind == "sd2" else 3
        shapes |= {
            prefix + key: shape for key, shape in open_clip_layout(WIDER, layers, VOCABULARY)
        }
    return shapes


@cache
def narrow_weights(kind):
    """Returns the weights of `narrow_shapes`; not to be changed."""
    return sane_weights(narrow_shapes(kind))


def layout_for(shapes, family):
    """Returns the layout of a file of these tensors, whatever a detection would say."""
    tensors = {key: TensorInfo(torch.float32, shape) for key, shape in shapes.items()}
    return layout_of(Header(Path("a.safetensors"), tensors, {}, 0, 0), family)


def diffusers_unet(kind):
    """Returns diffusers' UNet without weights."""
    shape = UNETS[kind]
    channels = [factor * shape.width for factor in shape.multiples]
    crossed = [bool(depth) for depth in shape.depths]
    labels = (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shape.labels,
        }
        if shape.labels
        else {}
    )
    with torch.device("meta"):
        return UNet2DConditionModel(
            in_channels=shape.input_channels,
            block_out_channels=channels,
            cross_attention_dim=shape.context,
            # diffusers' name for their number
            attention_head_dim=[max(n // 64, 1) for n in channels] if shape.matrices else 8,
            use_linear_projection=shape.matrices,
            transformer_layers_per_block=[max(depth, 1) for depth in shape.depths]
            if shape.depths[-1]
            else 1,
            down_block_types=[
                "CrossAttnDownBlock2D" if crosses else "DownBlock2D" for crosses in crossed
            ],
            up_block_types=[
                "CrossAttnUpBlock2D" if crosses else "UpBlock2D" for crosses in reversed(crossed)
            ],
            **labels,
        )


def run_diffusers_unet(kind, state, latents, steps, context, pooled=None):
    """Returns the output of diffusers' UNet with a checkpoint's weights."""
    unet = diffusers_unet(kind)
    weights = {key: value for key, value in state.items() if key.startswith(UNET_PREFIX)}
    converted = convert_ldm_unet_checkpoint(weights, dict(unet.config))
    assert converted.keys() == dict(unet.named_parameters()).keys()
    added = {}
    if pooled is not None:
        numbers = [1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]
        numbers = [*numbers[:4], 6.0] if kind == "sdxl_refiner" else numbers
        added["added_cond_kwargs"] = {
            "text_embeds": pooled,
            "time_ids": torch.tensor([numbers]).repeat(len(latents), 1),
        }
    return torch.func.functional_call(unet, converted, (latents, steps, context), added).sample


def _configuration(width, layers, activation):
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act=activation,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )


def transformers_clip(state, prefix):
    """Returns transformers' text encoder with a checkpoint's weights."""
    encoder = CLIPTextModel(_configuration(WIDE, 3, "quick_gelu")).eval()
    weights = {
        "text_model." + key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix)
    }
    encoder.load_state_dict(weights)
    return encoder


def transformers_open_clip(state, prefix):
    """Returns transformers' text encoder with the weights of an OpenCLIP, converted by diffusers.

    That of SD 2 has 23 layers and no projection, as diffusers makes it.
    """
    of_sd2 = prefix == OPEN_CLIP_PREFIX
    make = CLIPTextModel if of_sd2 else CLIPTextModelWithProjection
    encoder = make(_configuration(WIDER, 23 if of_sd2 else 3, "gelu")).eval()
    weights = {key: value for key, value in state.items() if key.startswith(prefix)}
    encoder.load_state_dict(convert_open_clip_checkpoint(encoder, weights, prefix=prefix))
    return encoder


class InputLog:
    """What a network's parts are called with."""

    def __init__(self, monkeypatch):
        self.unet = self.texts = None
        run_unet, run_text = UNet.__call__, TextEncoder.__call__

        def unet(part, *inputs):
            self.unet = inputs
            return run_unet(part, *inputs)

        def text(part, tokens, ends):
            self.texts = [*(self.texts or []), (part.prefix, tokens, ends)]
            return run_text(part, tokens, ends)

        monkeypatch.setattr(UNet, "__call__", unet)
        monkeypatch.setattr(TextEncoder, "__call__", text)
