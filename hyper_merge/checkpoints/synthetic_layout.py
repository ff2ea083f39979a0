"""Keys and shapes of a whole SD 1.x checkpoint, from the architecture's hyper-parameters; no tensors.

For tests, benchmarks and demonstrations: `width=32` has the same 1131 keys as the real thing.
"""

from __future__ import annotations

from collections.abc import Iterator

Shape = tuple[int, ...]
Entry = tuple[str, Shape]

UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIX = "cond_stage_model.transformer.text_model."
VAE_PREFIX = "first_stage_model."

_LATENT_CHANNELS = 4
_IMAGE_CHANNELS = 3
_TOKEN_POSITIONS = 77
_UNET_MULTIPLES = (1, 2, 4, 4)
_UNET_ATTENTION_LEVELS = (0, 1, 2)
_UNET_RES_BLOCKS = 2
_VAE_MULTIPLES = (1, 2, 4, 4)
_VAE_RES_BLOCKS = 2


def sd1_layout(
    width: int = 320,
    context: int = 768,
    text_layers: int = 12,
    vocabulary: int = 49408,
    vae_width: int = 128,
) -> dict[str, Shape]:
    """Every key of an SD 1.x checkpoint with its shape, in the order of the network; no schedules.

    At the defaults this is the real layout: UNet 686 keys, text encoder 197, VAE 248. The only
    tensor that is not floating point is `...embeddings.position_ids` (int64).

    Args:
        width: channels of the UNet's first level; the time embedding has four times as many.
        context: width of the text encoder, read by the UNet's cross-attention.
        text_layers: transformer layers of the text encoder.
        vocabulary: tokens known to the text encoder.
        vae_width: channels of the VAE's first level.

    Returns:
        Full key (with the checkpoint's prefixes) to shape.
    """
    layout = {TEXT_PREFIX + key: shape for key, shape in _clip(context, text_layers, vocabulary)}
    layout |= {UNET_PREFIX + key: shape for key, shape in _unet(width, context)}
    layout |= {VAE_PREFIX + key: shape for key, shape in _vae(vae_width)}
    return layout


def _linear(name: str, inputs: int, outputs: int) -> Iterator[Entry]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> Iterator[Entry]:
    yield f"{name}.weight", (outputs, inputs, kernel, kernel)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int) -> Iterator[Entry]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _clip(width: int, layers: int, vocabulary: int) -> Iterator[Entry]:
    yield "embeddings.position_ids", (1, _TOKEN_POSITIONS)
    yield "embeddings.token_embedding.weight", (vocabulary, width)
    yield "embeddings.position_embedding.weight", (_TOKEN_POSITIONS, width)
    for index in range(layers):
        name = f"encoder.layers.{index}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _linear(f"{name}.self_attn.{part}", width, width)
        yield from _norm(f"{name}.layer_norm1", width)
        yield from _linear(f"{name}.mlp.fc1", width, 4 * width)
        yield from _linear(f"{name}.mlp.fc2", 4 * width, width)
        yield from _norm(f"{name}.layer_norm2", width)
    yield from _norm("final_layer_norm", width)


def _unet(width: int, context: int) -> Iterator[Entry]:
    embedding = 4 * width
    yield from _linear("time_embed.0", width, embedding)
    yield from _linear("time_embed.2", embedding, embedding)
    yield from _conv("input_blocks.0.0", _LATENT_CHANNELS, width)
    skips = [width]
    yield from _unet_input(width, context, skips)
    middle = skips[-1]
    yield from _unet_res("middle_block.0", middle, middle, embedding)
    yield from _transformer("middle_block.1", middle, context)
    yield from _unet_res("middle_block.2", middle, middle, embedding)
    yield from _unet_output(width, context, skips)
    yield from _norm("out.0", width)
    yield from _conv("out.2", width, _LATENT_CHANNELS)


def _unet_input(width: int, context: int, skips: list[int]) -> Iterator[Entry]:
    """The way down; appends the channels of every skip connection to `skips`."""
    index = 0
    for level, multiple in enumerate(_UNET_MULTIPLES):
        channels = multiple * width
        for _ in range(_UNET_RES_BLOCKS):
            index += 1
            yield from _unet_res(f"input_blocks.{index}.0", skips[-1], channels, 4 * width)
            if level in _UNET_ATTENTION_LEVELS:
                yield from _transformer(f"input_blocks.{index}.1", channels, context)
            skips.append(channels)
        if level < len(_UNET_MULTIPLES) - 1:
            index += 1
            yield from _conv(f"input_blocks.{index}.0.op", channels, channels)
            skips.append(channels)


def _unet_output(width: int, context: int, skips: list[int]) -> Iterator[Entry]:
    """The way up; takes the skip connections off the end of `skips`."""
    index, current = 0, skips[-1]
    for level in reversed(range(len(_UNET_MULTIPLES))):
        channels = _UNET_MULTIPLES[level] * width
        for block in range(_UNET_RES_BLOCKS + 1):
            name = f"output_blocks.{index}"
            yield from _unet_res(f"{name}.0", current + skips.pop(), channels, 4 * width)
            current, slot = channels, 1
            if level in _UNET_ATTENTION_LEVELS:
                yield from _transformer(f"{name}.1", channels, context)
                slot = 2
            if level and block == _UNET_RES_BLOCKS:
                yield from _conv(f"{name}.{slot}.conv", channels, channels)
            index += 1


def _unet_res(name: str, inputs: int, outputs: int, embedding: int) -> Iterator[Entry]:
    yield from _norm(f"{name}.in_layers.0", inputs)
    yield from _conv(f"{name}.in_layers.2", inputs, outputs)
    yield from _linear(f"{name}.emb_layers.1", embedding, outputs)
    yield from _norm(f"{name}.out_layers.0", outputs)
    yield from _conv(f"{name}.out_layers.3", outputs, outputs)
    if inputs != outputs:
        yield from _conv(f"{name}.skip_connection", inputs, outputs, kernel=1)


def _transformer(name: str, width: int, context: int) -> Iterator[Entry]:
    yield from _norm(f"{name}.norm", width)
    yield from _conv(f"{name}.proj_in", width, width, kernel=1)
    block = f"{name}.transformer_blocks.0"
    for attention, source in (("attn1", width), ("attn2", context)):
        yield f"{block}.{attention}.to_q.weight", (width, width)
        yield f"{block}.{attention}.to_k.weight", (width, source)
        yield f"{block}.{attention}.to_v.weight", (width, source)
        yield from _linear(f"{block}.{attention}.to_out.0", width, width)
    yield from _linear(f"{block}.ff.net.0.proj", width, 8 * width)  # GEGLU: gate and value
    yield from _linear(f"{block}.ff.net.2", 4 * width, width)
    for index in (1, 2, 3):
        yield from _norm(f"{block}.norm{index}", width)
    yield from _conv(f"{name}.proj_out", width, width, kernel=1)


def _vae(width: int) -> Iterator[Entry]:
    top = _VAE_MULTIPLES[-1] * width
    moments = 2 * _LATENT_CHANNELS  # mean and log-variance
    yield from _conv("encoder.conv_in", _IMAGE_CHANNELS, width)
    yield from _vae_down(width)
    yield from _vae_middle("encoder.mid", top)
    yield from _norm("encoder.norm_out", top)
    yield from _conv("encoder.conv_out", top, moments)
    yield from _conv("quant_conv", moments, moments, kernel=1)
    yield from _conv("post_quant_conv", _LATENT_CHANNELS, _LATENT_CHANNELS, kernel=1)
    yield from _conv("decoder.conv_in", _LATENT_CHANNELS, top)
    yield from _vae_middle("decoder.mid", top)
    yield from _vae_up(width)
    yield from _norm("decoder.norm_out", width)
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
    yield from _norm(f"{name}.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{name}.attn_1.{part}", width, width, kernel=1)
    yield from _vae_res(f"{name}.block_2", width, width)


def _vae_res(name: str, inputs: int, outputs: int) -> Iterator[Entry]:
    yield from _norm(f"{name}.norm1", inputs)
    yield from _conv(f"{name}.conv1", inputs, outputs)
    yield from _norm(f"{name}.norm2", outputs)
    yield from _conv(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        yield from _conv(f"{name}.nin_shortcut", inputs, outputs, kernel=1)
