"""Where the parameters of diffusers' and transformers' networks stand in checkpoints, and their files."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hyper_merge.synthetic.checkpoint_layouts import UNET_PREFIX

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the library, on being imported
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

_UNUSED = ("position_ids", "logit_scale")  # of text encoders, by no text
_OPEN_CLIP_WORDS = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.": "embeddings.token_embedding.",
    "transformer.resblocks.": "encoder.layers.",
    "attn.out_proj.": "self_attn.out_proj.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "ln_final.": "final_layer_norm.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_TOGETHER = "attn.in_proj_"  # query, key and value


@dataclass(frozen=True)
class Place:
    """Where a parameter stands in a checkpoint."""

    key: str
    third: int | None = None  # of the tensor's rows, where three parameters share it
    turned: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """Returns the view of the checkpoint's tensor that is the parameter."""
        part = tensor if self.third is None else tensor.chunk(3)[self.third]
        return part.T if self.turned else part


def unet_places(unet: nn.Module, keys: Iterable[str]) -> dict[str, Place]:
    """Returns the place of every parameter of `unet`, by its name in the whole network."""
    own = {key: key for key in keys if key.startswith(UNET_PREFIX)}
    converted = convert_ldm_unet_checkpoint(own, dict(unet.config))
    return {f"unet.{name}": Place(key) for name, key in converted.items()}


def clip_places(part: str, prefix: str, keys: Iterable[str]) -> dict[str, Place]:
    """Returns the places of a text encoder that is stored as transformers names it."""
    return {f"{part}.text_model.{key}": Place(prefix + key) for key in _after(prefix, keys)}


def open_clip_places(part: str, prefix: str, keys: Iterable[str]) -> dict[str, Place]:
    """Returns the places of a text encoder with projection that is stored as OpenCLIP names it."""
    places = {}
    for key in _after(prefix, keys):
        name = key
        for old, new in _OPEN_CLIP_WORDS.items():
            name = name.replace(old, new)
        if key == "text_projection":
            places[f"{part}.text_projection.weight"] = Place(prefix + key, turned=True)
        elif _TOGETHER in key:
            for third, letter in enumerate("qkv"):
                own = name.replace(_TOGETHER, f"self_attn.{letter}_proj.")
                places[f"{part}.text_model.{own}"] = Place(prefix + key, third)
        else:
            places[f"{part}.text_model.{name}"] = Place(prefix + key)
    return places


def save_checkpoint(
    path: Path, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float16
) -> None:
    """Writes a checkpoint that hosts recognise."""
    tensors = {key: tensor.to("cpu", dtype).contiguous() for key, tensor in state.items()}
    save_file(tensors, path)


def load_checkpoint(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint by their keys, in float32."""
    return {key: tensor.float() for key, tensor in load_file(path).items()}


def _after(prefix: str, keys: Iterable[str]) -> list[str]:
    """Returns what follows a prefix, without what no text needs."""
    own = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
    return [key for key in own if not key.endswith(_UNUSED)]
