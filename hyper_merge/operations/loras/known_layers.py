"""Lists the layers of every family at full size, by which LoRA files are recognised without a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from hyper_merge.checkpoints.architectures.families import family_named
from hyper_merge.checkpoints.architectures.layout import Layer, layout_of
from hyper_merge.checkpoints.architectures.spec import Family
from hyper_merge.checkpoints.io.header import Header, Shape, TensorInfo
from hyper_merge.loras.module_names import ModuleIndex
from hyper_merge.synthetic.checkpoint_layouts import sd1_layout, sd2_layout, sdxl_layout
from hyper_merge.synthetic.family_layouts import (
    flux_layout,
    refiner_layout,
    sd3_layout,
    text_encoders_layout,
)
from hyper_merge.synthetic.mmdit_layouts import FluxShape, JointShape

_CLIP_L: Final = 768
_CLIP_G: Final = 1280


def _sd3(shape: JointShape) -> dict[str, Shape]:
    return {**text_encoders_layout(_CLIP_L, _CLIP_G), **sd3_layout(shape)}


def _flux(*, guidance: bool) -> dict[str, Shape]:
    return {**text_encoders_layout(_CLIP_L), **flux_layout(FluxShape(guidance=guidance))}


_LAYOUTS: Final[Mapping[str, Callable[[], dict[str, Shape]]]] = {
    "sd1": sd1_layout,
    "sdxl": sdxl_layout,
    "sd2": sd2_layout,
    "sdxl_refiner": refiner_layout,
    "flux_dev": lambda: _flux(guidance=True),
    "flux_schnell": lambda: _flux(guidance=False),
    "sd3_medium": lambda: _sd3(JointShape()),
    "sd35_large": lambda: _sd3(JointShape(blocks=38, normed=True)),
    "sd35_medium": lambda: _sd3(
        JointShape(blocks=24, second_attention=13, normed=True, positions=384)
    ),
}
"""Keys and shapes by family; of those that share all modules the first is taken."""


@dataclass(frozen=True, eq=False)
class KnownFamily:
    """A family with its layers at full size."""

    family: Family
    layers: tuple[Layer, ...]
    index: ModuleIndex


@functools.cache
def known_family(name: str) -> KnownFamily:
    """Returns a family of `known_names` with its layers."""
    family = family_named(name)
    if family is None:
        raise KeyError(name)
    tensors = {key: TensorInfo(torch.float16, shape) for key, shape in _LAYOUTS[name]().items()}
    header = Header(path=Path(name), tensors=tensors, metadata={}, size=0, mtime_ns=0)
    layers = layout_of(header, family).layers
    return KnownFamily(family, layers, ModuleIndex(layers))


def known_names() -> tuple[str, ...]:
    """Returns the names of all families whose LoRAs are recognised."""
    return tuple(_LAYOUTS)
