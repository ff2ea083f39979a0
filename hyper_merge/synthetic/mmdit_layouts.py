"""Keys and shapes of the transformers of SD 3 and Flux and of T5, from their hyper-parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hyper_merge.synthetic.network_layouts import Entry, linear

_PATCH = 2
_FREQUENCIES = 256  # of the time step


@dataclass(frozen=True)
class JointShape:
    """What tells one SD 3 transformer from another; the defaults are those of SD 3 medium."""

    blocks: int = 24
    head: int = 64  # width of one of the heads, which are as many as the blocks
    context: int = 4096  # of the text features
    labels: int = 2048  # of the pooled ones
    positions: int = 192  # along each side
    second_attention: int = 0  # blocks that have one
    normed: bool = False  # queries and keys
    channels: int = 16  # of the latent

    @property
    def width(self) -> int:
        """The width of the hidden features."""
        return self.head * self.blocks


@dataclass(frozen=True)
class FluxShape:
    """What tells one Flux transformer from another; the defaults are those of Flux dev."""

    double: int = 19
    single: int = 38
    width: int = 3072
    head: int = 128
    context: int = 4096
    labels: int = 768
    channels: int = 64  # of a patch of the latent
    guidance: bool = True


def joint_transformer(shape: JointShape) -> Iterator[Entry]:
    """Yields the transformer of SD 3 or 3.5."""
    width = shape.width
    yield "pos_embed", (1, shape.positions**2, width)
    yield "x_embedder.proj.weight", (width, shape.channels, _PATCH, _PATCH)
    yield "x_embedder.proj.bias", (width,)
    for name, inputs in (("t_embedder", _FREQUENCIES), ("y_embedder", shape.labels)):
        yield from linear(f"{name}.mlp.0", inputs, width)
        yield from linear(f"{name}.mlp.2", width, width)
    yield from linear("context_embedder", shape.context, width)
    for index in range(shape.blocks):
        name, last = f"joint_blocks.{index}", index == shape.blocks - 1
        yield from _joint_side(f"{name}.context_block", shape, last=last, second=False)
        second = index < shape.second_attention
        yield from _joint_side(f"{name}.x_block", shape, last=False, second=second)
    yield from linear("final_layer.linear", width, _PATCH**2 * shape.channels)
    yield from linear("final_layer.adaLN_modulation.1", width, 2 * width)


def _joint_side(name: str, shape: JointShape, *, last: bool, second: bool) -> Iterator[Entry]:
    width = shape.width
    yield from _joint_attention(f"{name}.attn", shape, last=last)
    if second:
        yield from _joint_attention(f"{name}.attn2", shape, last=False)
    if not last:
        yield from linear(f"{name}.mlp.fc1", width, 4 * width)
        yield from linear(f"{name}.mlp.fc2", 4 * width, width)
    modulations = 2 if last else 9 if second else 6
    yield from linear(f"{name}.adaLN_modulation.1", width, modulations * width)


def _joint_attention(name: str, shape: JointShape, *, last: bool) -> Iterator[Entry]:
    yield from linear(f"{name}.qkv", shape.width, 3 * shape.width)
    if shape.normed:
        yield f"{name}.ln_q.weight", (shape.head,)
        yield f"{name}.ln_k.weight", (shape.head,)
    if not last:
        yield from linear(f"{name}.proj", shape.width, shape.width)


def flux_transformer(shape: FluxShape) -> Iterator[Entry]:
    """Yields the transformer of Flux."""
    width = shape.width
    yield from linear("img_in", shape.channels, width)
    yield from linear("txt_in", shape.context, width)
    embeddings = [("time_in", _FREQUENCIES), ("vector_in", shape.labels)]
    embeddings += [("guidance_in", _FREQUENCIES)] if shape.guidance else []
    for name, inputs in embeddings:
        yield from linear(f"{name}.in_layer", inputs, width)
        yield from linear(f"{name}.out_layer", width, width)
    for index in range(shape.double):
        for side in ("img", "txt"):
            name = f"double_blocks.{index}.{side}"
            yield from linear(f"{name}_mod.lin", width, 6 * width)
            yield from linear(f"{name}_attn.qkv", width, 3 * width)
            yield from _flux_norms(f"{name}_attn", shape)
            yield from linear(f"{name}_attn.proj", width, width)
            yield from linear(f"{name}_mlp.0", width, 4 * width)
            yield from linear(f"{name}_mlp.2", 4 * width, width)
    for index in range(shape.single):
        name = f"single_blocks.{index}"
        yield from linear(f"{name}.linear1", width, 7 * width)  # query, key, value, MLP
        yield from linear(f"{name}.linear2", 5 * width, width)
        yield from _flux_norms(name, shape)
        yield from linear(f"{name}.modulation.lin", width, 3 * width)
    yield from linear("final_layer.linear", width, shape.channels)
    yield from linear("final_layer.adaLN_modulation.1", width, 2 * width)


def _flux_norms(name: str, shape: FluxShape) -> Iterator[Entry]:
    yield f"{name}.norm.query_norm.scale", (shape.head,)
    yield f"{name}.norm.key_norm.scale", (shape.head,)


def t5(width: int, layers: int, vocabulary: int) -> Iterator[Entry]:
    """Yields a T5 encoder with gated MLPs, with the keys of transformers."""
    yield "shared.weight", (vocabulary, width)
    for index in range(layers):
        name = f"encoder.block.{index}.layer"
        for part in "qkvo":
            yield f"{name}.0.SelfAttention.{part}.weight", (width, width)
        if not index:
            yield f"{name}.0.SelfAttention.relative_attention_bias.weight", (32, width // 64 or 1)
        yield f"{name}.0.layer_norm.weight", (width,)
        for part in ("wi_0", "wi_1"):
            yield f"{name}.1.DenseReluDense.{part}.weight", (5 * width // 2, width)
        yield f"{name}.1.DenseReluDense.wo.weight", (width, 5 * width // 2)
        yield f"{name}.1.layer_norm.weight", (width,)
    yield "encoder.final_layer_norm.weight", (width,)
