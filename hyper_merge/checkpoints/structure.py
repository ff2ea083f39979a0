"""Questions about a file's keys by which families are told apart: structure, never widths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from hyper_merge.checkpoints.header import Header

UNET: Final = "model.diffusion_model."
_FIRST_CONVOLUTION: Final = UNET + "input_blocks.0.0.weight"


@dataclass(frozen=True)
class Structure:
    """The keys of a file and their shapes."""

    shapes: Mapping[str, tuple[int, ...] | None]  # None: of a type that torch does not know

    @staticmethod
    def of(header: Header) -> Structure:
        """The structure of a file; tensors of unknown types count as keys."""
        known = {key: info.shape for key, info in header.tensors.items()}
        return Structure({**known, **dict.fromkeys(header.unsupported)})

    def has(self, *prefixes: str) -> bool:
        """Whether any key begins with one of `prefixes`."""
        return any(key.startswith(prefixes) for key in self.shapes)

    def any_match(self, pattern: str) -> bool:
        """Whether the regular expression is found in any key."""
        search = re.compile(pattern).search
        return any(search(key) for key in self.shapes)

    def all_match(self, pattern: str) -> bool:
        """Whether the regular expression is found in every key."""
        search = re.compile(pattern).search
        return all(search(key) for key in self.shapes)

    @property
    def input_channels(self) -> int | None:
        """Channels that an LDM UNet reads: 4, inpainting 9, instruct-pix2pix 8; None if it is none."""
        shape = self.shapes.get(_FIRST_CONVOLUTION)
        return shape[1] if shape is not None and len(shape) == 4 else None

    @property
    def label_embedding(self) -> bool:
        """Whether the UNet is conditioned on a vector: SDXL, its refiner, unCLIP."""
        return self.has(UNET + "label_emb.")

    @property
    def pruned(self) -> bool:
        """Whether an LDM UNet lacks its middle's transformer or a residual block of its levels."""
        middle = self.has(UNET + "middle_block.1.transformer_blocks.")
        return not (middle and UNET + "input_blocks.3.0.op.weight" in self.shapes)
