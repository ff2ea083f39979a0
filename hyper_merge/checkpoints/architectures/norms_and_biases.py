"""Norms and biases of the UNet, which LoRA factors cannot hold but hosts take from a LoRA file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from hyper_merge.checkpoints.architectures.layout import Layout, Treatment
from hyper_merge.checkpoints.architectures.spec import NetworkPart
from hyper_merge.checkpoints.io.header import Header

Kind = Literal["norms", "biases", "end biases"]

_WEIGHT: Final = ".weight"
_BIAS: Final = ".bias"


@dataclass(frozen=True)
class NormOrBias:
    """A tensor of one dimension and the key of its change in a LoRA file."""

    key: str  # in the checkpoint
    lora_key: str
    kind: Kind
    size: int


def norms_and_biases_of(header: Header, layout: Layout) -> tuple[NormOrBias, ...]:
    """Returns the norms of the UNet that have scales and biases, and the layers' biases.

    They are named by the checkpoint's own spelling, which A1111, Forge and ComfyUI all take for these.
    A1111 refuses a file with half of a norm, or with the bias of a layer and nothing else of it. It
    takes the bias of a layer at an end whose weight is one whole tensor under the same name.

    Args:
        header: of a checkpoint.
        layout: of the same.
    """
    whole = {layer.key: layer.module for layer in layout.layers if layer.whole}
    tensors = []
    for part in layout.family.parts:
        stems = {} if part.name != "unet" else _stems(header, layout, part)
        for stem, weight_dimensions in stems.items():
            path = stem.removeprefix(part.prefix)
            name = layout.family.lora_spelling.module(part.lora_prefix, path)
            bias = header.tensors[stem + _BIAS]
            if weight_dimensions == 1:
                tensors.append(NormOrBias(stem + _WEIGHT, name + ".w_norm", "norms", bias.numel))
                tensors.append(NormOrBias(stem + _BIAS, name + ".b_norm", "norms", bias.numel))
            elif stem + _WEIGHT in whole:
                lora_key = whole[stem + _WEIGHT] + ".diff_b"
                tensors.append(NormOrBias(stem + _BIAS, lora_key, "end biases", bias.numel))
            else:
                tensors.append(NormOrBias(stem + _BIAS, name + ".diff_b", "biases", bias.numel))
    return tuple(tensors)


def _stems(header: Header, layout: Layout, part: NetworkPart) -> dict[str, int]:
    """Returns the number of the weight's dimensions by stem, where there is an averaged bias too."""
    within = tuple(
        other.prefix
        for other in layout.family.parts
        if other.prefix != part.prefix and other.prefix.startswith(part.prefix)
    )
    return {
        stem: len(header.tensors[stem + _WEIGHT].shape)
        for stem in (key.removesuffix(_BIAS) for key in header.tensors if key.endswith(_BIAS))
        if stem.startswith(part.prefix)
        and not stem.startswith(within)
        and stem + _WEIGHT in header.tensors
        and layout.treatments[stem + _BIAS] is Treatment.AVERAGE
    }
