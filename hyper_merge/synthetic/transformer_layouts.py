"""Keys and shapes of the newer transformers, from their hyper-parameters; the defaults are the real ones."""

from __future__ import annotations

from collections.abc import Iterator

from hyper_merge.synthetic.mmdit_layouts import FluxShape, flux_transformer
from hyper_merge.synthetic.network_layouts import Entry, linear, norm

_FREQUENCIES = 256  # of the time step


def matrix(name: str, inputs: int, outputs: int) -> Entry:
    """Returns a matrix without a bias."""
    return f"{name}.weight", (outputs, inputs)


def chroma(shape: FluxShape | None = None, guidance: int = 5120) -> Iterator[Entry]:
    """Yields Chroma: Flux without modulations, and the network that makes them."""
    shape = shape or FluxShape(guidance=False)
    for key, size in flux_transformer(shape):
        if not any(part in key for part in ("_mod.", "modulation", "time_in", "vector_in")):
            yield key, size
    yield from linear("distilled_guidance_layer.in_proj", 64, guidance)
    for index in range(5):
        yield from linear(f"distilled_guidance_layer.layers.{index}.in_layer", guidance, guidance)
        yield from linear(f"distilled_guidance_layer.layers.{index}.out_layer", guidance, guidance)
        yield f"distilled_guidance_layer.norms.{index}.scale", (guidance,)
    yield from linear("distilled_guidance_layer.out_proj", guidance, shape.width)


def flux2(
    width: int = 4096,
    blocks: tuple[int, int] = (8, 24),
    context: int = 12288,
    *,
    guidance: bool = False,
    head: int = 128,
    channels: int = 128,
) -> Iterator[Entry]:
    """Yields Flux.2, by default klein of nine billion numbers."""
    yield matrix("img_in", channels, width)
    yield matrix("txt_in", context, width)
    for name in ("time_in", "guidance_in")[: 1 + guidance]:
        yield matrix(f"{name}.in_layer", _FREQUENCIES, width)
        yield matrix(f"{name}.out_layer", width, width)
    for side in ("img", "txt"):
        yield matrix(f"double_stream_modulation_{side}.lin", width, 6 * width)
    yield matrix("single_stream_modulation.lin", width, 3 * width)
    for index in range(blocks[0]):
        for side in ("img", "txt"):
            name = f"double_blocks.{index}.{side}"
            yield matrix(f"{name}_attn.qkv", width, 3 * width)
            yield f"{name}_attn.norm.query_norm.scale", (head,)
            yield f"{name}_attn.norm.key_norm.scale", (head,)
            yield matrix(f"{name}_attn.proj", width, width)
            yield matrix(f"{name}_mlp.0", width, 6 * width)
            yield matrix(f"{name}_mlp.2", 3 * width, width)
    for index in range(blocks[1]):
        name = f"single_blocks.{index}"
        yield matrix(f"{name}.linear1", width, 9 * width)
        yield matrix(f"{name}.linear2", 4 * width, width)
        yield f"{name}.norm.query_norm.scale", (head,)
        yield f"{name}.norm.key_norm.scale", (head,)
    yield matrix("final_layer.linear", width, channels)
    yield matrix("final_layer.adaLN_modulation.1", width, 2 * width)


def z_image(width: int = 3840, layers: int = 30, head: int = 128) -> Iterator[Entry]:
    """Yields Z-Image."""
    yield from _lumina_ends(width, 2560, 256)
    yield "x_pad_token", (1, width)
    yield "cap_pad_token", (1, width)
    for name, conditioned in _lumina_blocks(layers):
        yield from _lumina_block(name, width, width, 8 * width // 3, head)
        if conditioned:
            yield from linear(f"{name}.adaLN_modulation.0", _FREQUENCIES, 4 * width)


def lumina2(width: int = 2304, layers: int = 26, head: int = 96) -> Iterator[Entry]:
    """Yields Lumina 2: its keys and values have a third of the query's rows."""
    yield from _lumina_ends(width, 2304, 1024)
    for name, conditioned in _lumina_blocks(layers):
        yield from _lumina_block(name, width, width // 3, 4 * width, head)
        if conditioned:
            yield from linear(f"{name}.adaLN_modulation.1", min(width, 1024), 4 * width)


def _lumina_ends(width: int, features: int, time: int) -> Iterator[Entry]:
    yield from linear("x_embedder", 64, width)
    yield "cap_embedder.0.weight", (features,)
    yield from linear("cap_embedder.1", features, width)
    yield from linear("t_embedder.mlp.0", _FREQUENCIES, time)
    yield from linear("t_embedder.mlp.2", time, time)
    yield from linear("final_layer.linear", width, 64)
    yield from linear("final_layer.adaLN_modulation.1", time, width)


def _lumina_blocks(layers: int) -> Iterator[tuple[str, bool]]:
    yield from ((f"noise_refiner.{index}", True) for index in range(2))
    yield from ((f"context_refiner.{index}", False) for index in range(2))
    yield from ((f"layers.{index}", True) for index in range(layers))


def _lumina_block(name: str, width: int, keys: int, hidden: int, head: int) -> Iterator[Entry]:
    yield matrix(f"{name}.attention.qkv", width, width + 2 * keys)
    yield matrix(f"{name}.attention.out", width, width)
    yield f"{name}.attention.q_norm.weight", (head,)
    yield f"{name}.attention.k_norm.weight", (head,)
    yield matrix(f"{name}.feed_forward.w1", width, hidden)
    yield matrix(f"{name}.feed_forward.w3", width, hidden)
    yield matrix(f"{name}.feed_forward.w2", hidden, width)
    for part in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        yield f"{name}.{part}.weight", (width,)


def cosmos(width: int = 2048, blocks: int = 28, context: int = 1024) -> Iterator[Entry]:
    """Yields the transformer of Cosmos-Predict2."""
    yield matrix("x_embedder.proj.1", 68, width)
    yield matrix("t_embedder.1.linear_1", width, width)
    yield matrix("t_embedder.1.linear_2", width, 3 * width)
    yield "t_embedding_norm.weight", (width,)
    for index in range(blocks):
        name = f"blocks.{index}"
        for kind, features in (("self", width), ("cross", context)):
            yield matrix(f"{name}.{kind}_attn.q_proj", width, width)
            yield matrix(f"{name}.{kind}_attn.k_proj", features, width)
            yield matrix(f"{name}.{kind}_attn.v_proj", features, width)
            yield matrix(f"{name}.{kind}_attn.output_proj", width, width)
            yield f"{name}.{kind}_attn.q_norm.weight", (128,)
            yield f"{name}.{kind}_attn.k_norm.weight", (128,)
        yield matrix(f"{name}.mlp.layer1", width, 4 * width)
        yield matrix(f"{name}.mlp.layer2", 4 * width, width)
        for part in ("self_attn", "cross_attn", "mlp"):
            yield matrix(f"{name}.adaln_modulation_{part}.1", width, _FREQUENCIES)
            yield matrix(f"{name}.adaln_modulation_{part}.2", _FREQUENCIES, 3 * width)
    yield matrix("final_layer.linear", width, 64)
    yield matrix("final_layer.adaln_modulation.1", width, _FREQUENCIES)
    yield matrix("final_layer.adaln_modulation.2", _FREQUENCIES, 2 * width)


def anima(
    width: int = 2048, blocks: int = 28, context: int = 1024, vocabulary: int = 32128
) -> Iterator[Entry]:
    """Yields Anima: Cosmos-Predict2 and an adapter of six blocks."""
    yield from cosmos(width, blocks, context)
    yield "llm_adapter.embed.weight", (vocabulary, context)
    for index in range(6):
        name = f"llm_adapter.blocks.{index}"
        for kind in ("self", "cross"):
            for part in "qkvo":
                yield matrix(f"{name}.{kind}_attn.{part}_proj", context, context)
            yield f"{name}.{kind}_attn.q_norm.weight", (64,)
            yield f"{name}.{kind}_attn.k_norm.weight", (64,)
        yield from linear(f"{name}.mlp.0", context, 4 * context)
        yield from linear(f"{name}.mlp.2", 4 * context, context)
        for part in ("norm_self_attn", "norm_cross_attn", "norm_mlp"):
            yield f"{name}.{part}.weight", (context,)
    yield from linear("llm_adapter.out_proj", context, context)
    yield "llm_adapter.norm.weight", (context,)


def qwen_image(
    width: int = 3072, blocks: int = 60, context: int = 3584, head: int = 128
) -> Iterator[Entry]:
    """Yields Qwen-Image."""
    yield from linear("img_in", 64, width)
    yield "txt_norm.weight", (context,)
    yield from linear("txt_in", context, width)
    yield from linear("time_text_embed.timestep_embedder.linear_1", _FREQUENCIES, width)
    yield from linear("time_text_embed.timestep_embedder.linear_2", width, width)
    for index in range(blocks):
        name = f"transformer_blocks.{index}"
        attention = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
        for part in (*attention, "to_out.0", "to_add_out"):
            yield from linear(f"{name}.attn.{part}", width, width)
        for part in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            yield f"{name}.attn.{part}.weight", (head,)
        for side in ("img", "txt"):
            yield from linear(f"{name}.{side}_mod.1", width, 6 * width)
            yield from linear(f"{name}.{side}_mlp.net.0.proj", width, 4 * width)
            yield from linear(f"{name}.{side}_mlp.net.2", 4 * width, width)
    yield from linear("norm_out.linear", width, 2 * width)
    yield from linear("proj_out", width, 64)


def wan(
    width: int = 5120,
    hidden: int = 13824,
    blocks: int = 40,
    channels: int = 16,
    *,
    reads_image: bool = False,
) -> Iterator[Entry]:
    """Yields Wan, by default the one of 14 billion numbers from text."""
    yield "patch_embedding.weight", (width, channels, 1, 2, 2)
    yield "patch_embedding.bias", (width,)
    yield from linear("text_embedding.0", 4096, width)
    yield from linear("text_embedding.2", width, width)
    yield from linear("time_embedding.0", _FREQUENCIES, width)
    yield from linear("time_embedding.2", width, width)
    yield from linear("time_projection.1", width, 6 * width)
    for index in range(blocks):
        name = f"blocks.{index}"
        yield f"{name}.modulation", (1, 6, width)
        for kind in ("self", "cross"):
            image = ("k_img", "v_img") if reads_image and kind == "cross" else ()
            for part in ("q", "k", "v", "o", *image):
                yield from linear(f"{name}.{kind}_attn.{part}", width, width)
            for part in ("norm_q", "norm_k", *(["norm_k_img"] if image else [])):
                yield f"{name}.{kind}_attn.{part}.weight", (width,)
        yield from norm(f"{name}.norm3", width)
        yield from linear(f"{name}.ffn.0", width, hidden)
        yield from linear(f"{name}.ffn.2", hidden, width)
    yield "head.modulation", (1, 2, width)
    yield from linear("head.head", width, 64)
