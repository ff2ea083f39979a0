"""Embedders and final layers, which our LoRAs do not carry, are read from those of other programs."""

import pytest
import torch
from lora_files import share, write
from narrow_layouts import NARROW, UNET
from safetensors.torch import load_file, save_file

from hyper_merge.checkpoints.architectures.detection import detect_family
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import CheckpointError
from hyper_merge.operations.loras.apply import run_apply
from hyper_merge.operations.loras.known_layers import known_family
from hyper_merge.operations.loras.request import ApplyRequest
from hyper_merge.runtime.progress import Progress

# The checkpoint's name, by which kohya's scripts and ComfyUI go, and diffusers' name of it.
NAMES = {
    "sd3_medium": {
        "x_embedder.proj": "pos_embed.proj",
        "context_embedder": "context_embedder",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    "chroma": {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "distilled_guidance_layer.layers.4.out_layer": "distilled_guidance_layer.layers.4.linear_2",
        "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
        "final_layer.linear": "proj_out",
    },
    "flux2_dev": {
        "img_in": "x_embedder",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    "z_image": {
        "x_embedder": "all_x_embedder.2-1",
        "cap_embedder.1": "cap_embedder.1",
        "t_embedder.mlp.0": "t_embedder.mlp.0",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    },
    "lumina_2": {
        "cap_embedder.1": "time_caption_embed.caption_embedder.1",
        "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    },
    "qwen_image": {"img_in": "img_in", "norm_out.linear": "norm_out.linear"},
    "anima": {
        "final_layer.linear": "proj_out",
        "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
        "blocks.3.cross_attn.output_proj": "transformer_blocks.3.attn2.to_out.0",
        "llm_adapter.blocks.5.cross_attn.o_proj": "llm_adapter.blocks.5.cross_attn.o_proj",
        "llm_adapter.out_proj": "llm_adapter.out_proj",
    },
    "wan_14b": {
        "head.head": "proj_out",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
    },
}
SWAPPED = {("sd3_medium", "norm_out.linear"), ("flux2_dev", "norm_out.linear")}


@pytest.mark.parametrize("network", NAMES)
def test_they_are_found_under_the_names_of_all_programs(network):
    index = known_family(network).index
    for stored, diffusers in NAMES[network].items():
        spellings = [
            f"lora_unet_{stored.replace('.', '_')}",
            f"diffusion_model.{stored}",
            f"transformer.{diffusers}",
        ]
        for name in spellings:
            (place,) = index.find(name)
            assert place.layer.key == f"{UNET}{stored}.weight"
        assert place.swapped == ((network, diffusers) in SWAPPED)


@pytest.mark.parametrize("family", ["sd35_medium", "chroma", "flux2_klein", "z_image", "lumina_2"])
def test_merges_of_checkpoints_average_them(family, tmp_path):
    tensors = {key: torch.zeros(shape) for key, shape in NARROW[family]().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    own = {layer.key for layer in layout_of(header, detect_family(header)).layers}
    every = layout_of(header, detect_family(header).as_lora_input()).layers
    added = {layer.key.removeprefix(UNET) for layer in every} - {k.removeprefix(UNET) for k in own}
    assert "final_layer.linear.weight" in added
    assert all(
        "embedder" in k or "_in." in k or "final_layer" in k or "guidance" in k for k in added
    )


def write_first(path, seed, ends=("lora_up", "lora_down")):
    """Writes a LoRA of a narrow SD 3.5's first convolution and its last layer."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, up, down in (
        ("lora_unet_x_embedder_proj", (12, 2, 1, 1), (2, 16, 2, 2)),
        ("lora_unet_final_layer_linear", (64, 2), (2, 12)),
    ):
        for end, shape in zip(ends, (up, down), strict=True):
            state[f"{name}.{end}.weight"] = torch.randn(shape, generator=generator)
    return write(path, state, {})


def test_they_are_added_to_a_checkpoint(tmp_path):
    shapes = NARROW["sd35_medium"]()
    model = tmp_path / "model.safetensors"
    save_file({key: torch.randn(shape) for key, shape in shapes.items()}, model)
    lora = write_first(tmp_path / "lora.safetensors", 0)
    result = run_apply(ApplyRequest((lora,), checkpoint=model), Progress())
    before, after, factors = load_file(model), load_file(result.path), load_file(lora)
    for stored in ("x_embedder.proj", "final_layer.linear"):
        name = f"lora_unet_{stored.replace('.', '_')}"
        up, down = (factors[f"{name}.lora_{x}.weight"].flatten(1) for x in ("up", "down"))
        key = f"{UNET}{stored}.weight"
        change = (after[key] - before[key]).flatten(1)
        torch.testing.assert_close(change, up @ down, atol=1e-4, rtol=1e-4)
    assert result.layers == 2


def test_they_are_shared_and_written(tmp_path):
    known = known_family("sd3_medium")
    layers = [x for x in known.layers if "final_layer" in x.module]
    paths = []
    for c in range(2):
        generator = torch.Generator().manual_seed(c)
        state = {}
        for layer in layers:
            state[f"{layer.module}.lora_up.weight"] = torch.randn(layer.m, 2, generator=generator)
            state[f"{layer.module}.lora_down.weight"] = torch.randn(2, layer.n, generator=generator)
        paths.append(write(tmp_path / f"{c}.safetensors", state, {}))
    result = share(paths, tmp_path / "models", ranks=(2, 2), iterations=20)
    assert result.report.loss < 1e-3
    written = {key.partition(".")[0] for path in result.loras for key in load_file(path)}
    assert written == {"lora_unet_final_layer_linear", "lora_unet_final_layer_adaLN_modulation_1"}


def test_what_no_network_has_stays_unknown(tmp_path):
    model = tmp_path / "model.safetensors"
    shapes = NARROW["sd35_medium"]()
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, model)
    state = {"lora_unet_z_embedder.lora_up.weight": torch.ones(12, 1)}
    state["lora_unet_z_embedder.lora_down.weight"] = torch.ones(1, 12)
    lora = write(tmp_path / "lora.safetensors", state, {})
    with pytest.raises(CheckpointError, match="unknown to this family"):
        run_apply(ApplyRequest((lora,), checkpoint=model), Progress())
