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

from hyper_merge.calibration.unet import (
    Observe,
    Read,
    attend,
    block_numbers,
    heads_of_size,
    ignore,
    is_complete,
    recomputed,
)
from hyper_merge.checkpoints.io.header import Shape

_HEAD: Final = 64  # channels of a head, in all of them
_CLIP_LAYER: Final = (
    *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
)
_OPEN_CLIP_LAYER: Final = ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")


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
        observe: Is told of every product with a weight, and may change it.
    """

    read: Read
    shapes: Mapping[str, Shape]
    prefix: str
    skipped: int = 0
    normed: bool = True
    observe: Observe = ignore

    @property
    def is_whole(self) -> bool:
        """Whether the file has all tensors of the encoder."""
        layer = _OPEN_CLIP_LAYER if self._is_open_clip else _CLIP_LAYER
        ends = (self._embedding, self._positions, f"{self._final}.weight")
        return (
            all(key in self.shapes for key in ends)
            and self._numbers == set(range(self._count))
            and is_complete(self.shapes, self.prefix, layer)
        )

    @property
    def width(self) -> int:
        """The channels of what the UNet reads."""
        return self.shapes[self._embedding][1]

    @property
    def pools(self) -> bool:
        """Whether it gives a pooled form too."""
        return self._projection in self.shapes

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
        count = self._count
        outer = hidden
        for number in range(count):
            if number == count - self.skipped:
                outer = hidden
            hidden = recomputed(layer, number, hidden)
        outer = outer if self.skipped else hidden
        outer = self._norm(self._final, outer) if self.normed else outer
        if not self.pools:
            return Encoded(outer)
        last = self._norm(self._final, hidden)
        pooled = last[torch.arange(len(last), device=last.device), ends]
        return Encoded(outer, pooled @ self.read(self._projection))

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
        query, key, value = self._matrix(f"{name}attn.in_proj_", normed).chunk(3, -1)
        attended = attend(query, key, value, _heads(query), causal=True)
        hidden = hidden + self._linear(f"{name}attn.out_proj", attended)
        inner = self._linear(f"{name}mlp.c_fc", self._norm(f"{name}ln_2", hidden))
        return hidden + self._linear(f"{name}mlp.c_proj", functional.gelu(inner))

    def _linear(self, name: str, hidden: Tensor) -> Tensor:
        return self._matrix(f"{name}.", hidden)

    def _matrix(self, start: str, hidden: Tensor) -> Tensor:
        key = f"{start}weight"
        output = functional.linear(hidden, self.read(key), self.read(f"{start}bias"))
        return self.observe(key, hidden, output)

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
    def _projection(self) -> str:
        return f"{self.prefix}text_projection"

    @property
    def _numbers(self) -> set[int]:
        side = "transformer.resblocks." if self._is_open_clip else "encoder.layers."
        return block_numbers(self.shapes, f"{self.prefix}{side}")

    @property
    def _count(self) -> int:
        """How many layers there are; the weights of query, key and value count, without biases."""
        end = "attn.in_proj_weight" if self._is_open_clip else "self_attn.q_proj.weight"
        return sum(key.startswith(self.prefix) and key.endswith(end) for key in self.shapes)


def _heads(query: Tensor) -> int:
    return heads_of_size(query.shape[-1], _HEAD)
