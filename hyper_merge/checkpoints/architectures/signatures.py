"""Properties of a file's keys by which families are recognised: structure, never widths."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from hyper_merge.checkpoints.io.header import Header, Shape

UNET: Final = "model.diffusion_model."
TEXTS: Final = ("cond_stage_model.", "conditioner.embedders.", "text_encoders.")
"""Keys of text encoders begin with one of these."""

LABELS: Final = UNET + "label_emb."
"""Prefix in a UNet that is conditioned on a vector: SDXL, its refiner, unCLIP."""

_FIRST_CONVOLUTION: Final = UNET + "input_blocks.0.0.weight"
_CONTEXT: Final = re.compile(r"model\.diffusion_model\..*\.attn2\.to_k\.weight")
_DOWNSAMPLER: Final = re.compile(r"model\.diffusion_model\.input_blocks\.(\d+)\.0\.op\.")
_TRANSFORMER: Final = re.compile(
    r"model\.diffusion_model\.(?:input_blocks\.(\d+)|middle_block)\.1\.transformer_blocks\.(\d+)\."
)
_PER_LEVEL: Final = 3  # two residual blocks and the downsampler


@dataclass(frozen=True)
class KeySignature:
    """The keys of a file and their shapes."""

    shapes: Mapping[str, Shape | None]  # None: of a type that torch does not know

    @staticmethod
    def from_header(header: Header) -> KeySignature:
        """Returns the signature of a file; tensors of unknown types count as keys."""
        known = header.shapes
        return KeySignature({**known, **dict.fromkeys(header.unsupported)})

    def has(self, *prefixes: str) -> bool:
        """Tells whether any key begins with one of `prefixes`."""
        return any(self._first_from(prefix).startswith(prefix) for prefix in prefixes)

    def mentions(self, *parts: str) -> bool:
        """Tells whether any key has one of `parts` within it."""
        return any(part in self._text for part in parts)

    def any_match(self, pattern: str) -> bool:
        """Tells whether the regular expression is found in any key."""
        return re.search(pattern, self._text, re.MULTILINE) is not None

    def shape_where(self, pattern: re.Pattern[str]) -> Shape | None:
        """Returns the shape of the first tensor whose whole key matches; None if there is none."""
        return next((shape for key, shape in self.shapes.items() if pattern.fullmatch(key)), None)

    @cached_property
    def has_text_encoder(self) -> bool:
        """Tells whether any text encoder is in the file."""
        return self.has(*TEXTS)

    @property
    def input_channels(self) -> int | None:
        """Number of channels that an LDM UNet reads: 4, inpainting 9, instruct-pix2pix 8; None if it is none."""
        shape = self.shapes.get(_FIRST_CONVOLUTION)
        return shape[1] if shape is not None and len(shape) == 4 else None

    @cached_property
    def context(self) -> int | None:
        """Width of the text features that an LDM UNet reads; None if it is none."""
        shape = self.shape_where(_CONTEXT)
        return shape[1] if shape is not None and len(shape) == 2 else None

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Number of transformers in each level of an LDM UNet, then in its middle: SD 1.x has 1, 1, 1, 0; 1.

        Empty if it is no such UNet, or one with other than two residual blocks a level.
        """
        samplers = sorted({int(match[1]) for match in self._matches(_DOWNSAMPLER)})
        if not samplers or samplers != [_PER_LEVEL * (n + 1) for n in range(len(samplers))]:
            return ()
        depths = [0] * (len(samplers) + 2)
        for match in self._matches(_TRANSFORMER):
            level = -1 if match[1] is None else (int(match[1]) - 1) // _PER_LEVEL
            if level > len(samplers):
                return ()
            depths[level] = max(depths[level], int(match[2]) + 1)
        return tuple(depths)

    def _matches(self, pattern: re.Pattern[str]) -> list[re.Match[str]]:
        return [match for match in map(pattern.match, self.shapes) if match]

    def _first_from(self, prefix: str) -> str:
        place = bisect_left(self._sorted, prefix)
        return self._sorted[place] if place < len(self._sorted) else ""

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self.shapes)

    @cached_property
    def _text(self) -> str:
        return "\n".join(self.shapes)
