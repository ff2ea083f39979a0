"""The treatment of every tensor of a checkpoint: layer of the LoRAs, averaged, copied or dropped."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.sections import OTHER
from hyper_merge.checkpoints.architectures.spec import (
    KOHYA,
    Family,
    LoraSpelling,
    NetworkPart,
    PartName,
)
from hyper_merge.checkpoints.io.dtypes import EIGHT_BIT_FLOATS
from hyper_merge.checkpoints.io.header import Header, Shape, TensorInfo, TensorsAsKey

_WEIGHT: Final = re.compile(r"(?P<path>.+)\.weight|(?P<fused>.+\.in_proj)_weight")
_POSITION_IDS: Final = ".embeddings.position_ids"
# Training leftovers that no program loads.
_UNUSED: Final = ("model_ema.", "first_stage_model.model_ema.", "first_stage_model.loss.")
_SCHEDULE: Final = re.compile(r"(alphas_cumprod|betas$|sqrt_|posterior_|log_|logvar$|lvlb_)[^.]*")
_NORM: Final = re.compile(
    r".*([._]norm\d?|[._]norm_\w+|\.norms\.\d+|[._]ln_\w+|\.in_layers\.0|\.out_layers\.0|\.out\.0)"
    r"\.(weight|bias|scale)"
)
_EMBEDDING: Final = re.compile(
    r".*((token|position|positional)_embedding|pos_embed|\.shared|\.embed|embed_tokens)(\.weight)?"
)


class Treatment(Enum):
    """The way in which a merge handles a tensor."""

    LAYER = "layer"  # averaged, and its deviations go into the LoRAs
    AVERAGE = "average"  # averaged only: norms, biases, embeddings, some ends of the network
    VAE = "vae"  # by the recipe's policy
    COPY = "copy"  # from the first checkpoint: position ids, schedules, markers, idle weights, non-floats
    DROP = "drop"  # left out: training averages


@dataclass(frozen=True)
class Layer:
    """A tensor, or rows of one, that takes a LoRA; seen as a matrix (m, n) = (out, in*kh*kw)."""

    key: str  # in the checkpoint
    module: str  # in a LoRA file, without the ends of its factors' keys
    part: PartName
    shape: Shape  # of the weight in the LoRA's consumer, 2-D or 4-D
    rows: tuple[int, int] | None = None  # of a fused tensor: first, end
    bundle: str | None = None  # layers of one bundle are in a LoRA file all or none
    section: str = OTHER  # of the network, for people: "IN04", "MID", "TE11"
    positions: int = 1  # at which it is applied in one run of its network
    # At an end of the network: in the LoRA's companion, for some programs choke on it in a LoRA.
    is_end: bool = False
    whole: bool = False  # in a file it is one tensor of its own shape in float32, not factors
    spelling: LoraSpelling = KOHYA  # of its factors in a file

    @property
    def m(self) -> int:
        """Number of rows of the matrix: outputs."""
        return self.shape[0]

    @property
    def n(self) -> int:
        """Number of columns of the matrix: inputs, times the kernel's area."""
        return math.prod(self.shape[1:])

    @property
    def kernel(self) -> tuple[int, int] | None:
        """Height and width of a convolution's kernel, None for a linear layer."""
        return (self.shape[2], self.shape[3]) if len(self.shape) == 4 else None

    @property
    def up_key(self) -> str:
        """The key of its left factor in a LoRA file."""
        return self.module + self.spelling.up

    @property
    def down_key(self) -> str:
        """The key of its right factor in a LoRA file."""
        return self.module + self.spelling.down

    def up_shape(self, rank: int) -> Shape:
        """Returns the shape of the left factor in a LoRA file."""
        return (self.m, rank, 1, 1) if self.kernel else (self.m, rank)

    def down_shape(self, rank: int) -> Shape:
        """Returns the shape of the right factor, which has the convolution's kernel."""
        return (rank, *self.shape[1:])


@dataclass(frozen=True)
class Layout:
    """The layers of one file, and the treatment of each of its tensors."""

    family: Family
    layers: tuple[Layer, ...]  # in the order of the computation
    treatments: Mapping[str, Treatment]  # of every key that torch can read

    @property
    def has_ends(self) -> bool:
        """Tells whether some of the layers are at the ends of the network."""
        return any(layer.is_end for layer in self.layers)

    def without_ends(self) -> Layout:
        """Returns the layout in which the layers at the ends of the network are averaged only."""
        ends = {layer.key for layer in self.layers if layer.is_end}
        treatments = {**self.treatments, **dict.fromkeys(ends, Treatment.AVERAGE)}
        layers = tuple(layer for layer in self.layers if not layer.is_end)
        return Layout(self.family, layers, treatments)


def layout_of(header: Header, family: Family) -> Layout:
    """Returns the treatment of each tensor, and the layers: text encoders, then the UNet down to up."""
    return _layout_of(TensorsAsKey(header), family)


@functools.lru_cache(maxsize=32)
def _layout_of(key: TensorsAsKey, family: Family) -> Layout:
    header = key.header
    layers = tuple(layer for part in family.parts for layer in _layers(header, part, family))
    keys = {layer.key for layer in layers}
    treatments = {
        key: Treatment.LAYER if key in keys else _treatment(key, info, family)
        for key, info in header.tensors.items()
    }
    return Layout(family, layers, treatments)


def kind_of_tensor(key: str, layout: Layout) -> str:
    """Returns a word for people for a tensor's kind, such as "norms"; "layers" where LoRAs carry it."""
    treatment = layout.treatments[key]
    if treatment is Treatment.VAE:
        return "VAE"
    if treatment is Treatment.LAYER:
        return "layers"
    if treatment is not Treatment.AVERAGE:
        return "copied" if treatment is Treatment.COPY else "dropped"
    if _NORM.fullmatch(key):
        return "norms"
    if _EMBEDDING.fullmatch(key):
        return "embeddings"
    return "biases" if key.endswith((".bias", "_bias")) else "other weights"


def output_tensors(first: Header, layout: Layout, dtype: torch.dtype) -> dict[str, TensorInfo]:
    """Returns type and shape of the tensors of the written average, by key.

    Args:
        first: the first checkpoint's header.
        layout: its layout.
        dtype: of everything that is averaged, of the VAE, and of weights that nobody runs.

    Returns:
        All keys of the first checkpoint but the dropped ones. Copied tensors keep their type, but 8-bit floats become float16 as
        they are read, and position ids are always int64 (`position_ids` makes them); schedules in
        less than float32 are left out, for loaders compute better ones.
    """
    tensors = {}
    for key, info in first.tensors.items():
        treatment = layout.treatments[key]
        if treatment is Treatment.DROP or _is_spoilt_schedule(key, info):
            continue
        if treatment is not Treatment.COPY or key.startswith(layout.family.idle):
            tensors[key] = TensorInfo(dtype, info.shape)
        else:
            tensors[key] = TensorInfo(_copied_dtype(key, info), info.shape)
    return tensors


def is_position_ids(key: str) -> bool:
    """Tells whether a key holds a text encoder's position ids, which `position_ids` makes again."""
    return key.endswith(_POSITION_IDS)


def position_ids(shape: tuple[int, ...]) -> Tensor:
    """Returns 0, 1, 2, ... along the last dimension; merges of the past often spoilt the stored ids."""
    return torch.arange(shape[-1]).expand(shape).contiguous()


def _layers(header: Header, part: NetworkPart, family: Family) -> Iterator[Layer]:
    keys = (key for key in header.tensors if key.startswith(part.prefix))
    for key in sorted(keys, key=_natural):
        info = header.tensors[key]
        match = _WEIGHT.fullmatch(key, len(part.prefix))
        if match is None or not info.dtype.is_floating_point:
            continue
        path = match["path"] or match["fused"]
        positions = part.positions(path, family.resolution)
        for module in part.modules(path, info.shape):
            name = family.lora_spelling.module(part.lora_prefix, module.path)
            bundle = module.bundle and part.lora_prefix + module.bundle
            yield Layer(
                key=key,
                module=name,
                part=part.name,
                shape=module.shape,
                rows=module.rows,
                bundle=bundle,
                section=part.section(path),
                positions=positions,
                is_end=module.is_end,
                whole=module.whole,
                spelling=family.lora_spelling,
            )


def _natural(key: str) -> list[tuple[int, str]]:
    """Returns a key that sorts numbers within names by value: block 2 before block 10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in key.split(".")]


def _treatment(key: str, info: TensorInfo, family: Family) -> Treatment:
    if key.startswith(_UNUSED):
        return Treatment.DROP
    if is_position_ids(key) or key.endswith(".logit_scale") or key.startswith(family.idle):
        return Treatment.COPY
    if info.numel == 0 or not info.dtype.is_floating_point:
        return Treatment.COPY
    if key.startswith(family.vae_prefixes):
        return Treatment.VAE
    # What stands outside of every network says something by being there (v_pred, ztsnr, edm_mean,
    # denoiser.sigmas, a schedule): averaged it would mean nothing.
    averaged = any(key.startswith(part.prefix) for part in family.parts)
    return Treatment.AVERAGE if averaged else Treatment.COPY


def _copied_dtype(key: str, info: TensorInfo) -> torch.dtype:
    if is_position_ids(key):
        return torch.int64
    return torch.float16 if info.dtype in EIGHT_BIT_FLOATS else info.dtype


def _is_spoilt_schedule(key: str, info: TensorInfo) -> bool:
    return bool(_SCHEDULE.fullmatch(key)) and info.dtype not in (torch.float32, torch.float64)
