"""Runs CLIP text encoders from the tensors of a checkpoint, in the spelling of OpenAI or OpenCLIP.

Sources: transformers, models/clip/modeling_clip.py; OpenCLIP, src/open_clip/transformer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hyper_merge.calibration.unet import Read, attend
from hyper_merge.checkpoints.io.header import Shape

_HEAD: Final = 64  # channels of a head, in all of them


@dataclass(frozen=True)
class Encoded:
    """What a text encoder says of prompts."""

    hidden: Tensor  # (b, tokens, width)
    pooled: Tensor | None = None  # (b, width): of the end of the text


@dataclass(frozen=True)
class TextEncoder:
    """A CLIP text encoder whose weights stay in the file.

    Attributes:
        read: Returns a tensor by its key.
        shapes: Of the checkpoint's tensors by key.
        prefix: Of the encoder's keys.
        skipped: How many of the last layers the UNet does not read.
        normed: Whether the UNet reads the final norm's output.
    """

    read: Read
    shapes: Mapping[str, Shape]
    prefix: str
    skipped: int = 0
    normed: bool = True

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the encoder knows."""
        return self.shapes[self._embedding][0]

    @property
    def positions(self) -> int:
        """The number of tokens that it reads."""
        return self.shapes[self._positions][0]

    def __call__(
        self,
        tokens: Tensor,  # (b, positions), int64
        ends: Tensor,  # (b,): place of the end of each text
    ) -> Encoded:
        """Returns what the UNet reads of the prompts."""
        embedded = functional.embedding(tokens, self.read(self._embedding))
        hidden = embedded + self.read(self._positions)[: tokens.shape[1]]
        hidden = hidden.detach().requires_grad_(torch.is_grad_enabled())
        layer = self._open_clip_layer if self._is_open_clip else self._clip_layer
        count = self._layers
        outer = hidden
        for number in range(count):
            if number == count - self.skipped:
                outer = hidden
            hidden = checkpoint(layer, number, hidden, use_reentrant=True)
        outer = outer if self.skipped else hidden
        outer = self._norm(self._final, outer) if self.normed else outer
        projection = f"{self.prefix}text_projection"
        if projection not in self.shapes:
            return Encoded(outer)
        last = self._norm(self._final, hidden)
        pooled = last[torch.arange(len(last), device=last.device), ends]
        return Encoded(outer, pooled @ self.read(projection))

    def _clip_layer(self, number: int, hidden: Tensor) -> Tensor:
        name = f"{self.prefix}encoder.layers.{number}."
        normed = self._norm(f"{name}layer_norm1", hidden)
        query, key, value = (
            self._linear(f"{name}self_attn.{part}_proj", normed) for part in ("q", "k", "v")
        )
        attended = attend(query, key, value, _heads(query), causal=True)
        hidden = hidden + self._linear(f"{name}self_attn.out_proj", attended)
        inner = self._linear(f"{name}mlp.fc1", self._norm(f"{name}layer_norm2", hidden))
        return hidden + self._linear(f"{name}mlp.fc2", inner * torch.sigmoid(1.702 * inner))

    def _open_clip_layer(self, number: int, hidden: Tensor) -> Tensor:
        name = f"{self.prefix}transformer.resblocks.{number}."
        normed = self._norm(f"{name}ln_1", hidden)
        weight, bias = (self.read(f"{name}attn.in_proj_{part}") for part in ("weight", "bias"))
        query, key, value = functional.linear(normed, weight, bias).chunk(3, -1)
        attended = attend(query, key, value, _heads(query), causal=True)
        hidden = hidden + self._linear(f"{name}attn.out_proj", attended)
        inner = self._linear(f"{name}mlp.c_fc", self._norm(f"{name}ln_2", hidden))
        return hidden + self._linear(f"{name}mlp.c_proj", functional.gelu(inner))

    def _linear(self, name: str, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.read(f"{name}.weight"), self.read(f"{name}.bias"))

    def _norm(self, name: str, hidden: Tensor) -> Tensor:
        weight, bias = self.read(f"{name}.weight"), self.read(f"{name}.bias")
        return functional.layer_norm(hidden, hidden.shape[-1:], weight, bias)

    @property
    def _is_open_clip(self) -> bool:
        return f"{self.prefix}positional_embedding" in self.shapes

    @property
    def _embedding(self) -> str:
        middle = "" if self._is_open_clip else "embeddings."
        return f"{self.prefix}{middle}token_embedding.weight"

    @property
    def _positions(self) -> str:
        if self._is_open_clip:
            return f"{self.prefix}positional_embedding"
        return f"{self.prefix}embeddings.position_embedding.weight"

    @property
    def _final(self) -> str:
        return f"{self.prefix}{'ln_final' if self._is_open_clip else 'final_layer_norm'}"

    @property
    def _layers(self) -> int:
        end = "attn.in_proj_weight" if self._is_open_clip else "self_attn.q_proj.weight"
        return sum(key.startswith(self.prefix) and key.endswith(end) for key in self.shapes)


def _heads(query: Tensor) -> int:
    return max(query.shape[-1] // _HEAD, 1)
