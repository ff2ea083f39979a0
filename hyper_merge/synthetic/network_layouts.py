"""Keys and shapes of the networks in a checkpoint, from the architectures' hyper-parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hyper_merge.checkpoints.io.header import Shape

Entry = tuple[str, Shape]

TOKEN_POSITIONS = 77

_LATENT_CHANNELS = 4
_IMAGE_CHANNELS = 3
_UNET_RES_BLOCKS = 2
_VAE_MULTIPLES = (1, 2, 4, 4)
_VAE_RES_BLOCKS = 2


@dataclass(frozen=True)
class UNetShape:
    """The hyper-parameters of an LDM UNet; the defaults are those of SD 1.x."""

    width: int = 320  # channels of the first level; the time embedding has four times as many
    context: int = 768  # of the text features that the cross-attention reads
    multiples: tuple[int, ...] = (1, 2, 4, 4)  # of the width, by level
    depths: tuple[int, ...] = (1, 1, 1, 0)  # transformers by level
    middle: int = 1  # transformers in the middle
    input_channels: int = 4
    matrices: bool = False  # around the transformers, instead of 1x1 convolutions
    labels: int = 0  # width of the vector that conditions it in addition; 0 for none


def linear(name: str, inputs: int, outputs: int) -> Iterator[Entry]:
    """Yields a matrix with its bias."""
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> Iterator[Entry]:
    yield f"{name}.weight", (outputs, inputs, kernel, kernel)
    yield f"{name}.bias", (outputs,)


def norm(name: str, width: int) -> Iterator[Entry]:
    """Yields a norm's scales and biases."""
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def clip_layout(width: int, layers: int, vocabulary: int) -> Iterator[Entry]:
    """Yields a CLIP text model with the keys of transformers, without the prefix `text_model.`."""
    yield "embeddings.position_ids", (1, TOKEN_POSITIONS)
    yield "embeddings.token_embedding.weight", (vocabulary, width)
    yield "embeddings.position_embedding.weight", (TOKEN_POSITIONS, width)
    for index in range(layers):
        name = f"encoder.layers.{index}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"{name}.self_attn.{part}", width, width)
        yield from norm(f"{name}.layer_norm1", width)
        yield from linear(f"{name}.mlp.fc1", width, 4 * width)
        yield from linear(f"{name}.mlp.fc2", 4 * width, width)
        yield from norm(f"{name}.layer_norm2", width)
    yield from norm("final_layer_norm", width)


def open_clip_layout(width: int, layers: int, vocabulary: int) -> Iterator[Entry]:
    """Yields an OpenCLIP text model: its attention's query, key and value are one tensor."""
    yield "positional_embedding", (TOKEN_POSITIONS, width)
    yield "text_projection", (width, width)
    yield "logit_scale", ()
    yield "token_embedding.weight", (vocabulary, width)
    for index in range(layers):
        name = f"transformer.resblocks.{index}"
        yield from norm(f"{name}.ln_1", width)
        yield f"{name}.attn.in_proj_weight", (3 * width, width)
        yield f"{name}.attn.in_proj_bias", (3 * width,)
        yield from linear(f"{name}.attn.out_proj", width, width)
        yield from norm(f"{name}.ln_2", width)
        yield from linear(f"{name}.mlp.c_fc", width, 4 * width)
        yield from linear(f"{name}.mlp.c_proj", 4 * width, width)
    yield from norm("ln_final", width)


def unet_layout(shape: UNetShape) -> Iterator[Entry]:
    """Yields an LDM UNet."""
    embedding = 4 * shape.width
    yield from linear("time_embed.0", shape.width, embedding)
    yield from linear("time_embed.2", embedding, embedding)
    if shape.labels:
        yield from linear("label_emb.0.0", shape.labels, embedding)
        yield from linear("label_emb.0.2", embedding, embedding)
    yield from _conv("input_blocks.0.0", shape.input_channels, shape.width)
    skips = [shape.width]
    yield from _unet_input(shape, skips)
    middle = skips[-1]
    yield from _unet_res("middle_block.0", middle, middle, embedding)
    yield from _transformers("middle_block.1", middle, shape.middle, shape)
    yield from _unet_res("middle_block.2", middle, middle, embedding)
    yield from _unet_output(shape, skips)
    yield from norm("out.0", shape.width)
    yield from _conv("out.2", shape.width, _LATENT_CHANNELS)


def _unet_input(shape: UNetShape, skips: list[int]) -> Iterator[Entry]:
    """Yields the way down; appends the channels of every skip connection to `skips`."""
    index = 0
    for level, multiple in enumerate(shape.multiples):
        channels = multiple * shape.width
        for _ in range(_UNET_RES_BLOCKS):
            index += 1
            yield from _unet_res(f"input_blocks.{index}.0", skips[-1], channels, 4 * shape.width)
            yield from _transformers(
                f"input_blocks.{index}.1", channels, shape.depths[level], shape
            )
            skips.append(channels)
        if level < len(shape.multiples) - 1:
            index += 1
            yield from _conv(f"input_blocks.{index}.0.op", channels, channels)
            skips.append(channels)


def _unet_output(shape: UNetShape, skips: list[int]) -> Iterator[Entry]:
    """Yields the way up; takes the skip connections off the end of `skips`."""
    index, current = 0, skips[-1]
    for level in reversed(range(len(shape.multiples))):
        channels, depth = shape.multiples[level] * shape.width, shape.depths[level]
        for block in range(_UNET_RES_BLOCKS + 1):
            name = f"output_blocks.{index}"
            yield from _unet_res(f"{name}.0", current + skips.pop(), channels, 4 * shape.width)
            yield from _transformers(f"{name}.1", channels, depth, shape)
            if level and block == _UNET_RES_BLOCKS:
                yield from _conv(f"{name}.{2 if depth else 1}.conv", channels, channels)
            current = channels
            index += 1


def _unet_res(name: str, inputs: int, outputs: int, embedding: int) -> Iterator[Entry]:
    yield from norm(f"{name}.in_layers.0", inputs)
    yield from _conv(f"{name}.in_layers.2", inputs, outputs)
    yield from linear(f"{name}.emb_layers.1", embedding, outputs)
    yield from norm(f"{name}.out_layers.0", outputs)
    yield from _conv(f"{name}.out_layers.3", outputs, outputs)
    if inputs != outputs:
        yield from _conv(f"{name}.skip_connection", inputs, outputs, kernel=1)


def _transformers(name: str, width: int, depth: int, shape: UNetShape) -> Iterator[Entry]:
    if not depth:
        return
    kernel = () if shape.matrices else (1, 1)
    yield from norm(f"{name}.norm", width)
    yield f"{name}.proj_in.weight", (width, width, *kernel)
    yield f"{name}.proj_in.bias", (width,)
    for index in range(depth):
        yield from _transformer(f"{name}.transformer_blocks.{index}", width, shape.context)
    yield f"{name}.proj_out.weight", (width, width, *kernel)
    yield f"{name}.proj_out.bias", (width,)


def _transformer(block: str, width: int, context: int) -> Iterator[Entry]:
    for attention, source in (("attn1", width), ("attn2", context)):
        yield f"{block}.{attention}.to_q.weight", (width, width)
        yield f"{block}.{attention}.to_k.weight", (width, source)
        yield f"{block}.{attention}.to_v.weight", (width, source)
        yield from linear(f"{block}.{attention}.to_out.0", width, width)
    yield from linear(f"{block}.ff.net.0.proj", width, 8 * width)  # GEGLU: gate and value
    yield from linear(f"{block}.ff.net.2", 4 * width, width)
    for index in (1, 2, 3):
        yield from norm(f"{block}.norm{index}", width)


def vae_layout(
    width: int, latent_channels: int = _LATENT_CHANNELS, *, quantised: bool = True
) -> Iterator[Entry]:
    """Yields a VAE of the LDM kind; SD 3 and Flux have more channels, no quantising layers."""
    top = _VAE_MULTIPLES[-1] * width
    moments = 2 * latent_channels  # mean and log-variance
    yield from _conv("encoder.conv_in", _IMAGE_CHANNELS, width)
    yield from _vae_down(width)
    yield from _vae_middle("encoder.mid", top)
    yield from norm("encoder.norm_out", top)
    yield from _conv("encoder.conv_out", top, moments)
    if quantised:
        yield from _conv("quant_conv", moments, moments, kernel=1)
        yield from _conv("post_quant_conv", latent_channels, latent_channels, kernel=1)
    yield from _conv("decoder.conv_in", latent_channels, top)
    yield from _vae_middle("decoder.mid", top)
    yield from _vae_up(width)
    yield from norm("decoder.norm_out", width)
    yield from _conv("decoder.conv_out", width, _IMAGE_CHANNELS)


def _vae_down(width: int) -> Iterator[Entry]:
    current = width
    for level, multiple in enumerate(_VAE_MULTIPLES):
        name, channels = f"encoder.down.{level}", multiple * width
        for block in range(_VAE_RES_BLOCKS):
            yield from _vae_res(f"{name}.block.{block}", current, channels)
            current = channels
        if level < len(_VAE_MULTIPLES) - 1:
            yield from _conv(f"{name}.downsample.conv", channels, channels)


def _vae_up(width: int) -> Iterator[Entry]:
    current = _VAE_MULTIPLES[-1] * width
    for level in reversed(range(len(_VAE_MULTIPLES))):
        name, channels = f"decoder.up.{level}", _VAE_MULTIPLES[level] * width
        for block in range(_VAE_RES_BLOCKS + 1):
            yield from _vae_res(f"{name}.block.{block}", current, channels)
            current = channels
        if level:
            yield from _conv(f"{name}.upsample.conv", channels, channels)


def _vae_middle(name: str, width: int) -> Iterator[Entry]:
    yield from _vae_res(f"{name}.block_1", width, width)
    yield from norm(f"{name}.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{name}.attn_1.{part}", width, width, kernel=1)
    yield from _vae_res(f"{name}.block_2", width, width)


def _vae_res(name: str, inputs: int, outputs: int) -> Iterator[Entry]:
    yield from norm(f"{name}.norm1", inputs)
    yield from _conv(f"{name}.conv1", inputs, outputs)
    yield from norm(f"{name}.norm2", outputs)
    yield from _conv(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        yield from _conv(f"{name}.nin_shortcut", inputs, outputs, kernel=1)
