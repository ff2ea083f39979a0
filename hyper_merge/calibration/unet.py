"""Runs the UNet of SD 1.x, SD 2.x and SDXL from the tensors of a checkpoint, by its own keys.

Hosts share no code that could do this, and a merge needs no more than outputs and gradients. The
structure is read off the keys. Weights are read where they are used and let go afterwards, so that a
run, also backward, holds those of one block. Source: Stability AI, generative-models,
sgm/modules/diffusionmodules/openaimodel.py and sgm/modules/attention.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from itertools import count
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hyper_merge.checkpoints.io.header import Shape

Read = Callable[[str], Tensor]
"""Returns a tensor of the checkpoint by its key, float32, on the device."""


class Observe(Protocol):
    """Is told of every product with a weight, and may change it."""

    def __call__(self, key: str, inputs: Tensor, output: Tensor, stride: int = 1) -> Tensor:
        """Sees what goes in and comes out; returns what goes on.

        Args:
            key: of the weight.
            inputs: (b, channels, height, width) of a convolution, else (b, ..., n).
            output: the same of what comes out.
            stride: of a convolution.
        """


def ignore(key: str, inputs: Tensor, output: Tensor, stride: int = 1) -> Tensor:
    """Observes nothing."""
    del key, inputs, stride
    return output


_GROUPS: Final = 32  # of every group norm
_EPSILON, _EPSILON_OF_TRANSFORMERS = 1e-5, 1e-6
_MAX_PERIOD: Final = 10_000.0


_ENDS: Final = ("time_embed.0", "time_embed.2", "middle_block.0.in_layers.2", "out.0", "out.2")
_TOGETHER: Final = (
    ("label_emb.0.0", "label_emb.0.2"),
    ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"),
    ("norm", "proj_in", "proj_out"),
    (
        *(f"attn{number}.to_{part}" for number in (1, 2) for part in ("q", "k", "v", "out.0")),
        *("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"),
    ),
)
"""Weights that every network has, and those that a block has all or none of."""


class UNet:
    """A denoiser whose weights stay in the file."""

    def __init__(
        self,
        read: Read,
        shapes: Mapping[str, Shape],
        prefix: str,
        heads_of: Callable[[int], int],
        observe: Observe = ignore,
    ) -> None:
        """Takes the network's tensors.

        Args:
            read: returns a tensor by its key.
            shapes: of the checkpoint's tensors by key.
            prefix: of the UNet's keys.
            heads_of: returns the heads of an attention of so many channels, which no file tells.
            observe: is told of every product with a weight, and may change it.
        """
        self._read, self._prefix, self._heads_of = read, prefix, heads_of
        self._shapes, self._observe = shapes, observe

    def __call__(
        self,
        latents: Tensor,  # (b, channels, height, width)
        steps: Tensor,  # (b,), 0 to 1000
        context: Tensor,  # (b, tokens, width)
        vector: Tensor | None = None,  # (b, size): of SDXL
    ) -> Tensor:  # (b, 4, height, width)
        """Returns the network's output; its graph recomputes block by block."""
        width = self._shape("time_embed.0")[1]
        times = time_embedding(steps, width).requires_grad_(torch.is_grad_enabled())
        embedding = self._mlp("time_embed", times)
        if vector is not None:
            embedding = embedding + self._mlp("label_emb.0", vector)
        hidden, skipped = latents, []
        for number in self._numbers("input_blocks"):
            hidden = self._block(f"input_blocks.{number}", hidden, embedding, context)
            skipped.append(hidden)
        hidden = self._block("middle_block", hidden, embedding, context)
        for number in self._numbers("output_blocks"):
            hidden = torch.cat([hidden, skipped.pop()], 1)
            hidden = self._block(f"output_blocks.{number}", hidden, embedding, context)
        return self._convolution("out.2", functional.silu(self._group_norm("out.0", hidden)))

    def vector_size(self) -> int | None:
        """Returns the size of the vector that the network reads beside the context, if any."""
        return self._shape("label_emb.0.0")[1] if self._has("label_emb.0.0") else None

    def context_width(self) -> int:
        """Returns the width of the context that the network reads."""
        end = ".attn2.to_k.weight"
        return next(shape[1] for key, shape in self._shapes.items() if key.endswith(end))

    def channels(self) -> int:
        """Returns the channels of the latents that the network reads."""
        return self._shape("input_blocks.0.0")[1]

    def _block(self, name: str, hidden: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        for place in count():
            part = f"{name}.{place}"
            if self._has(f"{part}.in_layers.2"):
                hidden = recomputed(self._residual, part, hidden, embedding)
            elif self._has(f"{part}.proj_in"):
                hidden = self._transformer(part, hidden, context)
            elif self._has(f"{part}.op"):
                hidden = recomputed(self._halved, f"{part}.op", hidden)
            elif self._has(f"{part}.conv"):
                hidden = recomputed(self._doubled, f"{part}.conv", hidden)
            elif self._has(part):
                hidden = self._convolution(part, hidden)
            else:
                break
        return hidden

    def _halved(self, name: str, hidden: Tensor) -> Tensor:
        return self._convolution(name, hidden, stride=2)

    def _doubled(self, name: str, hidden: Tensor) -> Tensor:
        return self._convolution(
            name, functional.interpolate(hidden, scale_factor=2.0, mode="nearest")
        )

    def _residual(self, name: str, hidden: Tensor, embedding: Tensor) -> Tensor:
        inner = functional.silu(self._group_norm(f"{name}.in_layers.0", hidden))
        inner = self._convolution(f"{name}.in_layers.2", inner)
        shift = self._matrix(f"{name}.emb_layers.1", functional.silu(embedding))
        inner = inner + shift[:, :, None, None]
        inner = functional.silu(self._group_norm(f"{name}.out_layers.0", inner))
        inner = self._convolution(f"{name}.out_layers.3", inner)
        skip = f"{name}.skip_connection"
        return inner + (self._convolution(skip, hidden) if self._has(skip) else hidden)

    def _transformer(self, name: str, hidden: Tensor, context: Tensor) -> Tensor:
        tokens = recomputed(self._tokens, name, hidden)
        for place in count():
            block = f"{name}.transformer_blocks.{place}"
            if not self._has(f"{block}.attn1.to_q"):
                break
            tokens = recomputed(self._transformer_block, block, tokens, context)
        pixels = recomputed(self._matrix, f"{name}.proj_out", tokens)
        return hidden + pixels.mT.reshape(hidden.shape)

    def _tokens(self, name: str, hidden: Tensor) -> Tensor:  # (b, positions, channels)
        normed = self._group_norm(f"{name}.norm", hidden, _EPSILON_OF_TRANSFORMERS)
        return self._matrix(f"{name}.proj_in", normed.flatten(2).mT)

    def _transformer_block(self, name: str, hidden: Tensor, context: Tensor) -> Tensor:
        normed = self._layer_norm(f"{name}.norm1", hidden)
        hidden = hidden + self._attention(f"{name}.attn1", normed, normed)
        normed = self._layer_norm(f"{name}.norm2", hidden)
        hidden = hidden + self._attention(f"{name}.attn2", normed, context)
        normed = self._layer_norm(f"{name}.norm3", hidden)
        value, gate = self._matrix(f"{name}.ff.net.0.proj", normed).chunk(2, -1)
        return hidden + self._matrix(f"{name}.ff.net.2", value * functional.gelu(gate))

    def _attention(self, name: str, hidden: Tensor, context: Tensor) -> Tensor:
        query = self._matrix(f"{name}.to_q", hidden)
        key, value = (self._matrix(f"{name}.{part}", context) for part in ("to_k", "to_v"))
        attended = attend(query, key, value, self._heads_of(query.shape[-1]))
        return self._matrix(f"{name}.to_out.0", attended)

    def _mlp(self, name: str, hidden: Tensor) -> Tensor:
        return self._matrix(f"{name}.2", functional.silu(self._matrix(f"{name}.0", hidden)))

    def _matrix(self, name: str, hidden: Tensor) -> Tensor:
        """Applies a matrix, which some families store as a convolution."""
        weight = self._weight(name).flatten(1)
        output = functional.linear(hidden, weight, self._bias(name))
        return self._observe(self._key(name), hidden, output)

    def _convolution(self, name: str, hidden: Tensor, stride: int = 1) -> Tensor:
        weight = self._weight(name)
        padding = weight.shape[-1] // 2
        output = functional.conv2d(hidden, weight, self._bias(name), stride, padding)
        return self._observe(self._key(name), hidden, output, stride)

    def _group_norm(self, name: str, hidden: Tensor, epsilon: float = _EPSILON) -> Tensor:
        return functional.group_norm(hidden, _GROUPS, self._weight(name), self._bias(name), epsilon)

    def _layer_norm(self, name: str, hidden: Tensor) -> Tensor:
        return functional.layer_norm(
            hidden, hidden.shape[-1:], self._weight(name), self._bias(name)
        )

    def _weight(self, name: str) -> Tensor:
        return self._read(self._key(name))

    def _key(self, name: str) -> str:
        return f"{self._prefix}{name}.weight"

    def _bias(self, name: str) -> Tensor | None:
        key = f"{self._prefix}{name}.bias"
        return self._read(key) if key in self._shapes else None

    def _has(self, name: str) -> bool:
        return f"{self._prefix}{name}.weight" in self._shapes

    def _shape(self, name: str) -> Shape:
        return self._shapes[f"{self._prefix}{name}.weight"]

    def _numbers(self, side: str) -> range:
        return range(len(block_numbers(self._shapes, f"{self._prefix}{side}.")))


def is_whole(shapes: Mapping[str, Shape], prefix: str) -> bool:
    """Tells whether a checkpoint has all tensors of a UNet, in widths that its norms divide."""
    sides = ("input_blocks", "output_blocks")
    down, up = (block_numbers(shapes, f"{prefix}{side}.") for side in sides)
    entrance = shapes.get(f"{prefix}input_blocks.0.0.weight", (1,))
    return (
        bool(down)
        and down == up == set(range(len(down)))
        and entrance[0] % _GROUPS == 0
        and all(f"{prefix}{name}.weight" in shapes for name in _ENDS)
        and all(is_complete(shapes, prefix, names) for names in _TOGETHER)
    )


def is_complete(shapes: Mapping[str, Shape], prefix: str, names: Collection[str]) -> bool:
    """Tells whether each block that has any of these weights has them all."""
    ends = tuple(f".{name}.weight" for name in names)
    blocks = Counter(
        key[: -len(end)]
        for key in shapes
        if key.startswith(prefix) and key.endswith(ends)
        for end in ends
        if key.endswith(end)
    )
    return all(count == len(ends) for count in blocks.values())


def time_embedding(
    steps: Tensor,  # (...,)
    width: int,
) -> Tensor:  # (..., width)
    """Returns cosines and sines of the steps at frequencies that fall geometrically."""
    half = width // 2
    powers = torch.arange(half, device=steps.device, dtype=torch.float32) / half
    angles = steps.float()[..., None] * torch.exp(-math.log(_MAX_PERIOD) * powers)
    return torch.cat([angles.cos(), angles.sin()], -1)


def attend(
    query: Tensor,  # (b, positions, channels)
    key: Tensor,  # (b, tokens, channels)
    value: Tensor,  # (b, tokens, channels)
    heads: int,
    *,
    causal: bool = False,
) -> Tensor:  # (b, positions, channels)
    """Returns the attention of several heads."""
    query, key, value = (
        tensor.view(*tensor.shape[:2], heads, -1).transpose(1, 2) for tensor in (query, key, value)
    )
    attended = functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
    return attended.transpose(1, 2).flatten(2)


def heads_of_size(channels: int, size: int) -> int:
    """Returns the number of heads of about so many channels each, which divides all of them."""
    return next(n for n in range(max(channels // size, 1), 0, -1) if channels % n == 0)


def block_numbers(shapes: Mapping[str, Shape], start: str) -> set[int]:
    """Returns the numbers that follow the start of a key."""
    words = {key[len(start) :].partition(".")[0] for key in shapes if key.startswith(start)}
    return {int(word) for word in words if word.isdecimal()}


def recomputed(function: Callable[..., Tensor], name: object, *tensors: Tensor) -> Tensor:
    """Runs a part of the network, and again in the backward pass, in place of keeping its graph.

    Args:
        function: takes the name and the tensors, and reads its weights itself.
        name: of the part.
        tensors: its inputs, of which one at least needs a gradient if any weight does.
    """
    if not torch.is_grad_enabled():
        return function(name, *tensors)
    return checkpoint(function, name, *tensors, use_reentrant=True, preserve_rng_state=False)
