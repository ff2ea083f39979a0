"""Counts, names and shapes of the layers of every family, by rules written from the loaders' sources."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from narrow_layouts import FULL, NARROW, UNET, other_way_round, parts, two, xl

from hyper_merge.checkpoints.architectures.detection import detect_family
from hyper_merge.checkpoints.architectures.key_conversion import with_standard_keys
from hyper_merge.checkpoints.architectures.layout import (
    Treatment,
    kind_of_tensor,
    layout_of,
    output_tensors,
)
from hyper_merge.checkpoints.io.header import TensorInfo
from hyper_merge.synthetic.family_layouts import text_encoders_layout

# UNet: linear, 1x1, 3x3 (with the residual blocks and samplers, without the network's ends); text.
COUNTS = {
    "sd1": (182, 46, 50, 72),
    "sd1_inpainting": (182, 46, 50, 72),
    "sd1_pix2pix": (182, 46, 50, 72),
    "sd2": (214, 14, 50, 138),
    "sd2_inpainting": (214, 14, 50, 138),
    "sd2_depth": (214, 14, 50, 138),
    "sdxl": (739, 11, 38, 72 + 192),
    "sdxl_inpainting": (739, 11, 38, 72 + 192),
    "sdxl_pix2pix": (739, 11, 38, 72 + 192),
    "sdxl_edm": (739, 11, 38, 72 + 192),
    "sdxl_edm_v": (739, 11, 38, 72 + 192),
    "sdxl_refiner": (484, 14, 50, 0),
    "sd3_medium": (237, 0, 0, 0),
    "sd35_medium": (263, 0, 0, 0),
    "sd35_large": (377, 0, 0, 0),
    "flux_dev": (304, 0, 0, 0),
    "flux_schnell": (304, 0, 0, 0),
    "chroma": (228, 0, 0, 0),
    "flux2_klein": (112 + 3, 0, 0, 0),
    "flux2_dev": (160 + 3, 0, 0, 0),
    "z_image": (270, 0, 0, 0),
    "lumina_2": (178, 0, 0, 0),
    "anima": (448, 0, 0, 0),
    "qwen_image": (840, 0, 0, 0),
    "qwen_image_edit_2511": (840, 0, 0, 0),
    "wan": (400, 0, 0, 0),
    "wan_i2v": (480, 0, 0, 0),
}
# Billions of numbers in the matrices that LoRAs carry.
BILLIONS = {
    "chroma": 8.607,
    "flux2_klein": 8.72 + 0.25,
    "z_image": 6.142,
    "lumina_2": 2.600,
    "anima": 1.762 + 0.176,
    "qwen_image": 20.4,
    "wan": 14.05,  # of 14.29
    "wan_i2v": 16.15,  # of 16.39
}
CLIP_PARTS = ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj")
ENDS = ("input_blocks.0.0.", "time_embed.", "label_emb.", "out.")
OPEN_CLIP = "cond_stage_model.model."
TEXTS = {
    "sd1": [("lora_te", 12, 768)],
    "sd2": [("lora_te", 23, 1024)],
    "sdxl": [("lora_te1", 12, 768), ("lora_te2", 32, 1280)],
    "sdxl_refiner": [],
    "sd3_medium": [("lora_te1", 12, 768), ("lora_te2", 32, 1280)],
    "sd35_large": [("lora_te1", 12, 768), ("lora_te2", 32, 1280)],
    "flux_dev": [("lora_te1", 12, 768)],
}
# Widths of the encoders that stand in one file with a transformer: CLIP-L, CLIP-G, T5, to which
# nobody makes LoRAs.
BESIDE = {
    "sd3_medium": (768, 1280, 4096),
    "sd35_large": (768, 1280, 4096),
    "flux_dev": (768, 0, 4096),
}


def layers_of(make_header, shapes):
    header = make_header(shapes)
    return layout_of(header, detect_family(header)).layers


@pytest.mark.parametrize("name", COUNTS)
def test_every_family_has_its_number_of_layers(make_header, name):
    layers = layers_of(make_header, FULL[name]())
    unet = Counter(layer.kernel for layer in layers if layer.part == "unet" and not layer.is_end)
    text = sum(layer.part == "text_encoder" for layer in layers)
    assert (unet[None], unet[1, 1], unet[3, 3], text) == COUNTS[name]
    assert len({layer.module for layer in layers}) == len(layers)


@pytest.mark.parametrize("name", NARROW)
def test_a_narrow_file_has_the_same_modules(make_header, name):
    modules = [layer.module for layer in layers_of(make_header, NARROW[name]())]
    full = {layer.module for layer in layers_of(make_header, FULL[name]())}
    if name.startswith(("sd1", "sd2", "sdxl")):  # the others have fewer blocks here
        assert set(modules) == full
    same = re.compile(r"\d+")
    kinds = [{same.sub("#", module) for module in names} for names in (modules, full)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("name", BILLIONS)
def test_loras_carry_nearly_all_of_a_transformer(make_header, name):
    layers = layers_of(make_header, FULL[name]())
    assert sum(x.m * x.n for x in layers) / 1e9 == pytest.approx(BILLIONS[name], rel=6e-3)


@pytest.mark.parametrize("name", ["sdxl", "sdxl_refiner"])
def test_sgm_modules_are_kohyas_targets_by_their_keys(make_header, name):
    """All of its Transformer2DModel, ResnetBlock2D, Downsample2D, Upsample2D: library/sdxl_original_unet.py."""
    shapes = {k.removeprefix(UNET): v for k, v in FULL[name]().items() if k.startswith(UNET)}
    expected = {
        "lora_unet_" + key.removesuffix(".weight").replace(".", "_"): shape
        for key, shape in shapes.items()
        if len(shape) > 1 and not key.startswith(ENDS)
    }
    layers = [layer for layer in layers_of(make_header, FULL[name]()) if not layer.is_end]
    assert {layer.module: layer.shape for layer in layers if layer.part == "unet"} == expected


# Of the ends A1111, Forge and ComfyUI all take diffusers' names in SD 1.x and 2.x, and in SDXL the
# checkpoint's own. Of conv_in they agree on four channels, as one tensor. Forge and ComfyUI, which
# run Flux, take every matrix of its transformer by its own name.
EMBEDDING = ("time_embedding_linear_1", "time_embedding_linear_2")
FLUX_ENDS = ("img_in", "txt_in", "final_layer_linear", "final_layer_adaLN_modulation_1")
EMBEDDERS = ("time_in", "vector_in", "guidance_in")
FLUX_ENDS += tuple(f"{name}_{side}_layer" for name in EMBEDDERS for side in ("in", "out"))
SGM = ("time_embed_0", "time_embed_2", "label_emb_0_0", "label_emb_0_2", "out_2")
CONVOLUTIONS = {
    "sd1": ("conv_in", "conv_out"),
    "sd1_inpainting": ("conv_out",),
    "sd1_pix2pix": ("conv_out",),
    "sd2": ("conv_in", "conv_out"),
    "sd2_inpainting": ("conv_out",),
    "sd2_depth": ("conv_out",),
    "sdxl": ("input_blocks_0_0",),
    "sdxl_inpainting": (),
    "sdxl_pix2pix": (),
    "sdxl_refiner": ("input_blocks_0_0",),
    "sd3_medium": (),
    "flux_dev": (),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_ends_have_the_names_that_all_hosts_take(make_header, name):
    linear = {"sd1": EMBEDDING, "sd2": EMBEDDING, "sdxl": SGM, "flux": FLUX_ENDS}.get(
        name.partition("_")[0], ()
    )
    ends = [layer for layer in layers_of(make_header, FULL[name]()) if layer.is_end]
    names = {layer.module.removeprefix("lora_unet_") for layer in ends}
    assert names == {*linear, *CONVOLUTIONS[name]}
    whole = {layer.module: layer.shape for layer in ends if layer.whole}
    first = {"conv_in", "input_blocks_0_0"} & names
    width = 384 if name == "sdxl_refiner" else 320
    assert whole == {f"lora_unet_{module}": (width, 4, 3, 3) for module in first}


def clip_modules(prefix, layers, width):
    """LORA_CLIP_MAP in comfy/lora.py: six names a layer, by the encoder's number."""
    expected = {}
    for index in range(layers):
        stem = f"{prefix}_text_model_encoder_layers_{index}"
        expected |= {f"{stem}_{part}": (width, width) for part in CLIP_PARTS}
        expected[f"{stem}_mlp_fc1"] = (4 * width, width)
        expected[f"{stem}_mlp_fc2"] = (width, 4 * width)
    return expected


@pytest.mark.parametrize("name", TEXTS)
def test_text_modules_are_comfyuis_map(make_header, name):
    expected = {}
    for encoder in TEXTS[name]:
        expected |= clip_modules(*encoder)
    shapes = FULL[name]()
    if name in BESIDE:
        shapes |= text_encoders_layout(*BESIDE[name])
    layers = layers_of(make_header, shapes)
    assert {layer.module: layer.shape for layer in layers if layer.part != "unet"} == expected


@pytest.mark.parametrize("name", ["sd3_medium", "sd35_medium", "sd35_large", "flux_dev"])
def test_modules_of_transformers_are_kohyas_targets_by_their_keys(make_header, name):
    """Every Linear within SingleDiTBlock (lora_sd3.py), DoubleStreamBlock, SingleStreamBlock (lora_flux.py)."""
    blocks = tuple(UNET + part for part in ("joint_blocks.", "double_blocks.", "single_blocks."))
    expected = {
        "lora_unet_" + key.removeprefix(UNET).removesuffix(".weight").replace(".", "_"): shape
        for key, shape in FULL[name]().items()
        if key.startswith(blocks) and len(shape) == 2
    }
    layers = [layer for layer in layers_of(make_header, FULL[name]()) if not layer.is_end]
    assert {layer.module: layer.shape for layer in layers} == expected
    assert all(layer.part == "unet" for layer in layers)


def test_only_the_clip_projection_in_use_is_averaged(make_header):
    """SD 3 reads the second encoder's projected output; the first's is the identity everywhere."""
    projections = {
        f"text_encoders.clip_{letter}.transformer.text_projection.weight": (8, 8) for letter in "lg"
    }
    for name, used in (("sd3_medium", ["g"]), ("flux_dev", [])):
        texts = text_encoders_layout(8, 16 * (name == "sd3_medium"), 64, 20)
        header = make_header({**NARROW[name](), **texts, **projections})
        layout = layout_of(header, detect_family(header))
        averaged = [key[19] for key in projections if layout.treatments[key] is Treatment.AVERAGE]
        assert averaged == used


@pytest.mark.parametrize("layout", [two, xl])
def test_a_fused_attention_is_three_layers_of_its_rows(make_header, layout):
    header = make_header(layout())
    file_layout = layout_of(header, detect_family(header))
    fused = [key for key in layout() if key.endswith("in_proj_weight")]
    for key in fused:
        three = [layer for layer in file_layout.layers if layer.key == key]
        width = layout()[key][1]
        if layout is two and ".23." in key:  # it never runs
            assert three == []
            assert file_layout.treatments[key] is Treatment.COPY
            continue
        assert [layer.rows for layer in three] == [(i * width, (i + 1) * width) for i in range(3)]
        assert [layer.module[-6:] for layer in three] == ["q_proj", "k_proj", "v_proj"]
        assert {layer.shape for layer in three} == {(width, width)}


def test_open_clip_attention_modules_are_one_bundle(make_header):
    groups = Counter(layer.bundle for layer in layers_of(make_header, xl()) if layer.bundle)
    assert set(groups.values()) == {4}
    assert set(groups) == {f"lora_te2_text_model.encoder.layers.{i}" for i in range(32)}


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl_refiner"])
def test_projections_are_layers_of_the_loaders_shape(make_header, name):
    plain = NARROW[name]()
    other = other_way_round(plain)
    assert other != plain
    header = make_header(other)
    layout = layout_of(header, detect_family(header))
    assert layout.layers == layers_of(make_header, plain)
    read = with_standard_keys(header)
    assert {key: info.shape for key, info in read.tensors.items()} == plain
    written = output_tensors(read, layout_of(read, layout.family), torch.float16)
    assert {key: info.shape for key, info in written.items()} == plain


@pytest.mark.parametrize("name", NARROW)
def test_nothing_of_a_network_is_left_without_a_kind(make_header, name):
    beside = text_encoders_layout(8, 16 * name.startswith("sd3"), 64, 20)
    texts = beside if name.startswith(("sd3", "flux_")) else {}
    header = make_header({**NARROW[name](), **texts})
    layout = layout_of(header, detect_family(header))
    other = {key for key in layout.treatments if kind_of_tensor(key, layout) == "other weights"}
    first = {UNET + end for end in ("input_blocks.0.0.weight", "out.2.weight")}
    text = ("text_projection", "text_projection.weight", "relative_attention_bias.weight")
    inside = ("T5", "t5xxl", "conditioner.embedders.0.model.")
    ends = ("time_embed", "label_emb", "_in.", "_embedder", "final_layer", "embedder.proj")
    if not name.startswith("sd"):
        ends += (
            "modulation",
            "_pad_token",
            "distilled_guidance_layer",
            "llm_adapter.",
            "head.head",
        )
        ends += (
            "norm_out.",
            "proj_out.",
            "patch_embedding.",
            "text_embedding.",
            "time_projection.",
        )
    for key in other - first:
        assert key.endswith(text) or any(part in key for part in (*inside, *ends)), key
    copied = {key for key in layout.treatments if kind_of_tensor(key, layout) == "copied"}
    idle = (OPEN_CLIP + "transformer.resblocks.23.", OPEN_CLIP + "text_projection")
    assert copied == {
        key
        for key in header.tensors
        if key.endswith(("position_ids", "logit_scale", "__")) or key.startswith(("edm_", *idle))
    }


def test_markers_of_v_prediction_are_kept(make_header):
    markers = {"v_pred": (0,), "ztsnr": (0,), "edm_mean": (1, 4, 1, 1), "denoiser.sigmas": (1000,)}
    header = make_header({**xl(), **markers}, dtype=torch.float32)
    layout = layout_of(header, detect_family(header))
    written = output_tensors(header, layout, torch.float16)
    for key, shape in markers.items():
        assert layout.treatments[key] is Treatment.COPY
        assert written[key] == TensorInfo(torch.float32, shape)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float32])
def test_copied_and_idle_weights_have_types_that_load(make_header, stored):
    beside = {"text_encoders.clip_l.transformer.text_projection.weight": (8, 8)}
    header = make_header({**two(), **beside}, dtype=stored)
    written = output_tensors(header, layout_of(header, detect_family(header)), torch.bfloat16)
    copied = torch.float16 if stored.itemsize == 1 else stored
    assert written.pop("text_encoders.clip_l.transformer.text_projection.weight").dtype == copied
    assert written.pop(OPEN_CLIP + "logit_scale").dtype == copied
    assert {info.dtype for info in written.values()} == {torch.bfloat16}


def test_every_tensor_of_a_depth_model_is_copied(make_header):
    shapes = {**NARROW["sd2_depth"](), "depth_model.model.scratch.weight": (4, 4)}
    header = make_header(shapes)
    layout = layout_of(header, detect_family(header))
    assert layout.treatments["depth_model.model.scratch.weight"] is Treatment.COPY
    assert all(not layer.key.startswith("depth_model") for layer in layout.layers)


def test_partial_files_have_the_layers_that_they_hold(make_header):
    alone = layers_of(make_header, parts(FULL["sdxl"](), UNET))
    assert len(alone) == 788 + 6
    assert {layer.part for layer in alone} == {"unet"}


# Parts of real checkpoints by the name of their list of keys, and their prefix in a checkpoint.
REAL = [
    ("sd1", "UNET-v1-SD", UNET),
    ("sd1_inpainting", "UNET-v1-Inpainting", UNET),
    ("sd1_pix2pix", "UNET-v1-Pix2Pix", UNET),
    ("sd1", "CLIP-v1-SD", "cond_stage_model.transformer.text_model."),
    ("sd1", "VAE-v1-SD", "first_stage_model."),
    ("sd2", "UNET-v2-SD", UNET),
    ("sd2_inpainting", "UNET-v2-Inpainting", UNET),
    ("sd2", "CLIP-v2-SD", OPEN_CLIP),
    ("sdxl", "UNET-XL-SD", UNET),
    ("sdxl", "CLIP-v1-SD", "conditioner.embedders.0.transformer.text_model."),
    ("sdxl", "CLIP-XL-SD", "conditioner.embedders.1.model."),
    ("sdxl_refiner", "UNET-XL-Refiner", UNET),
    ("sdxl_refiner", "CLIP-XL-SD", "conditioner.embedders.0.model."),
]


@pytest.mark.skipif("HYPER_MERGE_LAYOUTS" not in os.environ, reason="needs lists of real keys")
@pytest.mark.parametrize(("name", "part", "prefix"), REAL)
def test_layouts_have_the_keys_of_real_checkpoints(name, part, prefix):
    """A folder with `key [shape]` lines as arenasys/stable-diffusion-webui-model-toolkit has them."""
    lines = (Path(os.environ["HYPER_MERGE_LAYOUTS"]) / f"{part}.txt").read_text().splitlines()
    pairs = (line.split(" ") for line in lines)
    real = {prefix + key: tuple(json.loads(shape)) for key, shape in pairs}
    assert parts(FULL[name](), prefix) == real
