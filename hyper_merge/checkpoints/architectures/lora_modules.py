"""Rules from a tensor's key to the module names that LoRA loaders know; no lists of keys.

A rule takes the dotted path within its part of the checkpoint, without prefix and `.weight`, and
the stored shape, and returns the modules that the tensor is the weight of: none, one, or several
where a checkpoint stores them fused. Source: the loaders of A1111, kohya and diffusers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from hyper_merge.checkpoints.io.header import Shape

_SIDE_PATH: Final = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d)\.(.+)")
_MIDDLE_PATH: Final = re.compile(r"middle_block\.([012])\.(.+)")
_PER_LEVEL: Final = (
    3  # two residual blocks and a sampler on the way down, three blocks on the way up
)
_UNET_ENDS: Final = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_CONV_IN: Final = "input_blocks.0.0"
_LATENT: Final = 4  # channels of a latent
_RESNET: Final = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_CLIP_LAYER: Final = re.compile(r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")
_OPEN_CLIP_LAYER: Final = re.compile(
    r"transformer\.resblocks\.(\d+)\.(attn\.in_proj|attn\.out_proj|mlp\.c_fc|mlp\.c_proj)"
)
_OPEN_CLIP: Final = {
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


@dataclass(frozen=True)
class Module:
    """A module that a tensor is the weight of."""

    path: str  # dotted, as the LoRA's consumer spells it
    shape: Shape  # of the consumer's own weight
    rows: tuple[int, int] | None = None  # the module's rows in a fused tensor
    bundle: str | None = None  # modules of one bundle are in a LoRA file all or none
    is_end: bool = False  # at an end of the network: some loaders choke on a LoRA file with it
    whole: bool = False  # loaders take its change as one tensor, not as factors


def unet_with_convolutions(path: str, shape: Shape) -> tuple[Module, ...]:
    """Returns the modules of SD 1.x: diffusers' spelling, 1x1 convolutions around the transformers."""
    return _unet(diffusers_unet_path(path), path, shape, (1, 1))


def unet_with_matrices(path: str, shape: Shape) -> tuple[Module, ...]:
    """Returns the modules of SD 2.x: diffusers' spelling, matrices around the transformers."""
    return _unet(diffusers_unet_path(path), path, shape, ())


def unet_as_stored(path: str, shape: Shape) -> tuple[Module, ...]:
    """Returns the modules of SDXL and its refiner: their own spelling, no 1x1 convolutions."""
    return _unet(path if diffusers_unet_path(path) else None, path, shape, ())


def clip_text_model(path: str, shape: Shape) -> tuple[Module, ...]:
    """Returns the attention and MLP matrices of a CLIP text model in transformers' spelling."""
    if not _CLIP_LAYER.fullmatch(path):
        return ()
    return (Module(f"text_model.{path}", shape),)


def open_clip(path: str, shape: Shape, layers: int | None = None) -> tuple[Module, ...]:
    """Returns the attention and MLP matrices of an OpenCLIP text model, under transformers' names.

    Query, key and value are stored as one tensor and are three modules. A1111 changes an attention
    only if all four of its modules are in the file.

    Args:
        path: within the text model.
        shape: as stored.
        layers: how many of the layers take part; None for all.
    """
    match = _OPEN_CLIP_LAYER.fullmatch(path)
    if match is None or (layers is not None and int(match[1]) >= layers):
        return ()
    name, kind = f"text_model.encoder.layers.{match[1]}", match[2]
    attention = name if kind.startswith("attn") else None
    if kind != "attn.in_proj":
        return (Module(f"{name}.{_OPEN_CLIP[kind]}", shape, bundle=attention),)
    width = shape[0] // 3
    return tuple(
        Module(
            f"{name}.self_attn.{letter}_proj",
            (width, shape[1]),
            (place * width, (place + 1) * width),
            attention,
        )
        for place, letter in enumerate("qkv")
    )


def modules_matching(path: str, shape: Shape, names: str) -> tuple[Module, ...]:
    """Returns the matrix if its whole path matches a regular expression, in the checkpoint's spelling."""
    return (Module(path, shape),) if re.fullmatch(names, path) else ()


def no_modules(path: str, shape: Shape) -> tuple[Module, ...]:  # noqa: ARG001 - the form of a rule
    """Returns nothing: no loader knows LoRA modules of the network."""
    return ()


def diffusers_unet_path(path: str) -> str | None:
    """Returns an LDM UNet path in diffusers' spelling; None for one that such a UNet does not have.

    >>> diffusers_unet_path("input_blocks.4.1.proj_in")
    'down_blocks.1.attentions.0.proj_in'
    """
    if path in _UNET_ENDS:
        return _UNET_ENDS[path]
    if middle := _MIDDLE_PATH.fullmatch(path):
        number, rest = int(middle[1]), middle[2]
        return _block("mid_block", "attentions" if number == 1 else "resnets", number // 2, rest)
    match = _SIDE_PATH.fullmatch(path)
    if match is None:
        return None
    number, slot, rest = int(match[2]), int(match[3]), match[4]
    if match[1] == "input_blocks":
        level, index = divmod(number - 1, _PER_LEVEL)  # number 0 is conv_in
        side, sampler = f"down_blocks.{level}", ("op", "downsamplers.0.conv")
    else:
        level, index = divmod(number, _PER_LEVEL)
        side, sampler = f"up_blocks.{level}", ("conv", "upsamplers.0.conv")
    if rest == sampler[0]:
        return f"{side}.{sampler[1]}"
    return _block(side, "attentions" if slot else "resnets", index, rest)


def _unet(name: str | None, path: str, shape: Shape, kernel: Shape) -> tuple[Module, ...]:
    if name is None or len(shape) not in (2, 4):
        return ()
    if path in _UNET_ENDS:
        return _end(name, path, shape)
    # Files that other tools saved may hold these the other way; loaders want their own.
    projection = path.endswith((".proj_in", ".proj_out"))
    return (Module(name, (*shape[:2], *kernel) if projection else shape),)


def _end(name: str, path: str, shape: Shape) -> tuple[Module, ...]:
    """Returns a layer at an end of the UNet, which A1111, Forge and ComfyUI take.

    Of the first convolution they agree on the change of one that reads a latent and nothing else, as
    one tensor: Forge aborts on factors for another number of channels, A1111 pads all from 4 to 9.
    """
    if path != _CONV_IN:
        return (Module(name, shape, is_end=True),)
    return (Module(name, shape, is_end=True, whole=True),) if shape[1] == _LATENT else ()


def _block(side: str, kind: str, index: int, rest: str) -> str | None:
    module = rest if kind == "attentions" else _RESNET.get(rest)
    return module and f"{side}.{kind}.{index}.{module}"
