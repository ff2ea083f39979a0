"""Lists the layers of every network at full size, by which LoRA files are recognised without a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from hyper_merge.checkpoints.architectures.families import family_named
from hyper_merge.checkpoints.architectures.layout import Layer, layout_of
from hyper_merge.checkpoints.architectures.spec import Family
from hyper_merge.checkpoints.io.header import Header, Shape, TensorInfo
from hyper_merge.loras.module_names import ModuleIndex
from hyper_merge.synthetic.checkpoint_layouts import (
    UNET_PREFIX,
    sd1_layout,
    sd2_layout,
    sdxl_layout,
    under,
)
from hyper_merge.synthetic.family_layouts import (
    flux_layout,
    refiner_layout,
    sd3_layout,
    text_encoders_layout,
)
from hyper_merge.synthetic.mmdit_layouts import FluxShape, JointShape
from hyper_merge.synthetic.network_layouts import Entry
from hyper_merge.synthetic.transformer_layouts import (
    anima,
    chroma,
    flux2,
    lumina2,
    qwen_image,
    wan,
    z_image,
)

_CLIP_L: Final = 768
_CLIP_G: Final = 1280


def _sd3(shape: JointShape) -> dict[str, Shape]:
    return {**text_encoders_layout(_CLIP_L, _CLIP_G), **sd3_layout(shape)}


def _flux(*, guidance: bool) -> dict[str, Shape]:
    return {**text_encoders_layout(_CLIP_L), **flux_layout(FluxShape(guidance=guidance))}


def _transformer(entries: Callable[[], Iterable[Entry]]) -> Callable[[], dict[str, Shape]]:
    return lambda: under(UNET_PREFIX, entries())


_LAYOUTS: Final[Mapping[str, tuple[str, Callable[[], dict[str, Shape]]]]] = {
    "sd1": ("sd1", sd1_layout),
    "sdxl": ("sdxl", sdxl_layout),
    "sd2": ("sd2", sd2_layout),
    "sdxl_refiner": ("sdxl_refiner", refiner_layout),
    "flux_dev": ("flux_dev", lambda: _flux(guidance=True)),
    "flux_schnell": ("flux_schnell", lambda: _flux(guidance=False)),
    "chroma": ("chroma", _transformer(chroma)),
    "sd3_medium": ("sd3_medium", lambda: _sd3(JointShape())),
    "sd35_large": ("sd35_large", lambda: _sd3(JointShape(blocks=38, normed=True))),
    "sd35_medium": (
        "sd35_medium",
        lambda: _sd3(JointShape(blocks=24, second_attention=13, normed=True, positions=384)),
    ),
    "z_image": ("z_image", _transformer(z_image)),
    "lumina_2": ("lumina_2", _transformer(lumina2)),
    "anima": ("anima", _transformer(anima)),
    "qwen_image": ("qwen_image", _transformer(qwen_image)),
    "flux2_klein_9b": ("flux2_klein", _transformer(flux2)),
    "flux2_klein_4b": ("flux2_klein", _transformer(partial(flux2, 3072, (5, 20), 7680))),
    "flux2_dev": (
        "flux2_dev",
        _transformer(partial(flux2, 6144, (8, 48), 15360, guidance=True)),
    ),
    "wan_14b": ("wan", _transformer(wan)),
    "wan_5b": ("wan", _transformer(partial(wan, 3072, 14336, 30, 48))),
    "wan_1b": ("wan", _transformer(partial(wan, 1536, 8960, 30))),
    "wan_i2v_14b": ("wan_i2v", _transformer(partial(wan, channels=36, reads_image=True))),
}
"""Family, and keys with shapes, by the network's name; of those that share all modules the first is
taken, unless the file says another."""


_SIZES: Final = {
    "flux2_klein_9b": "9B",
    "flux2_klein_4b": "4B",
    "wan_14b": "14B",
    "wan_5b": "5B",
    "wan_1b": "1.3B",
}
"""Of networks of one family that differ in nothing else, as people call them."""


@dataclass(frozen=True, eq=False)
class KnownFamily:
    """A network of a family with its layers at full size."""

    family: Family
    title: str  # for people, with the size where it matters
    layers: tuple[Layer, ...]
    index: ModuleIndex

    def with_bundles(self, modules: Collection[str]) -> tuple[Layer, ...]:
        """Returns the layers of modules and those that must be in a file with them, in their order."""
        bundles = {x.bundle for x in self.layers if x.bundle and x.module in modules}
        return tuple(
            layer for layer in self.layers if layer.module in modules or layer.bundle in bundles
        )


@functools.cache
def known_family(name: str) -> KnownFamily:
    """Returns a network of `known_names` with its layers."""
    family_name, layout = _LAYOUTS[name]
    family = family_named(family_name)
    if family is None:
        raise KeyError(family_name)
    tensors = {key: TensorInfo(torch.float16, shape) for key, shape in layout().items()}
    header = Header(path=Path(name), tensors=tensors, metadata={}, size=0, mtime_ns=0)
    layers = layout_of(header, family.as_lora_input()).layers
    title = " ".join(word for word in (family.title, _SIZES.get(name)) if word)
    return KnownFamily(family, title, layers, ModuleIndex(layers, family))


def known_names() -> tuple[str, ...]:
    """Returns the names of all networks whose LoRAs are recognised."""
    return tuple(_LAYOUTS)
