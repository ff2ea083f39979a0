"""The names in LoRA files of the newer transformers, by rules written from the loaders' sources."""

import re

import pytest
import torch
from narrow_layouts import FULL, NARROW, UNET

from hyper_merge.checkpoints.architectures.detection import detect_family
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.checkpoints.architectures.norms_and_biases import norms_and_biases_of
from hyper_merge.checkpoints.io.header import Header, TensorInfo
from hyper_merge.loras.lora_file import lora_tensors

NATIVE = ("z_image", "lumina_2", "anima", "flux2_klein", "flux2_dev")
KOHYA = ("qwen_image", "chroma", "wan", "wan_i2v")


def layout(shapes):
    tensors = {key: TensorInfo(torch.bfloat16, shape) for key, shape in shapes.items()}
    header = Header(path="a.safetensors", tensors=tensors, metadata={}, size=0, mtime_ns=0)
    return header, layout_of(header, detect_family(header))


def table(name, rank=2):
    _, file_layout = layout(NARROW[name]())
    alpha = rank if file_layout.family.lora_alpha else None
    layers = file_layout.layers
    return lora_tensors(layers, [rank] * len(layers), torch.bfloat16, alpha)


@pytest.mark.parametrize("name", NATIVE)
def test_native_names_have_factors_a_and_b_and_no_alpha(name):
    keys = set(table(name))
    pattern = r"diffusion_model\.[\w.]+\.lora_[AB]\.weight"
    assert all(re.fullmatch(pattern, key) for key in keys)
    assert {key.replace("lora_A", "lora_B") for key in keys} <= keys


@pytest.mark.parametrize("name", KOHYA)
def test_kohyas_names_have_an_alpha_each(name):
    keys = set(table(name))
    modules = {key.removesuffix(".alpha") for key in keys if key.endswith(".alpha")}
    assert keys == {
        module + end
        for module in modules
        for end in (".alpha", ".lora_up.weight", ".lora_down.weight")
    }
    assert all(re.fullmatch(r"lora_unet_\w+", module) for module in modules)


@pytest.mark.parametrize("name", [*NATIVE, *KOHYA])
def test_fused_names_are_the_checkpoints_own(name):
    """What ComfyUI's generic map makes of a key: the key without its ending."""
    header, file_layout = layout(NARROW[name]())
    own = {
        key.removeprefix(UNET).removesuffix(".weight")
        for key in header.tensors
        if key.endswith(".weight")
    }
    spelt = own if name in NATIVE else {path.replace(".", "_") for path in own}
    split = re.compile(r".*attention\.to_([qkv]|out\.0)") if name == "z_image" else re.compile("-")
    for layer in file_layout.layers:
        path = layer.module.removeprefix("diffusion_model.").removeprefix("lora_unet_")
        assert path in spelt or split.fullmatch(path), path


def test_z_image_is_split_as_diffusers_has_it():
    """z_image_to_diffusers in ComfyUI's utils.py: rows of query, key and value in equal thirds."""
    _, file_layout = layout(FULL["z_image"]())
    stem = "diffusion_model.layers.7.attention."
    rows = {x.module: x.rows for x in file_layout.layers if x.module.startswith(stem)}
    assert rows == {
        f"{stem}to_q": (0, 3840),
        f"{stem}to_k": (3840, 7680),
        f"{stem}to_v": (7680, 11520),
        f"{stem}to_out.0": None,
    }


def test_lumina_stays_fused():
    _, file_layout = layout(FULL["lumina_2"]())
    fused = [x for x in file_layout.layers if x.module.endswith("attention.qkv")]
    assert {x.shape for x in fused} == {(3840, 2304)}
    assert {x.rows for x in fused} == {None}


@pytest.mark.parametrize("name", ["lumina_2", "wan", "wan_i2v"])
def test_all_modules_are_there_or_none(name):
    """diffusers' converters take every module of every block without asking whether it is there."""
    _, file_layout = layout(NARROW[name]())
    layers = file_layout.layers
    ranks = [0] * len(layers)
    assert not lora_tensors(layers, ranks, torch.bfloat16, None)
    ranks[3] = 2
    assert len(lora_tensors(layers, ranks, torch.bfloat16, None)) == 2 * len(layers)


def test_the_adapter_of_anima_is_averaged_and_in_no_lora():
    """Forge Neo moves it into the text encoder, with that one's multiplier."""
    header, file_layout = layout(NARROW["anima"]())
    adapter = [key for key in header.tensors if "llm_adapter" in key]
    assert {file_layout.treatments[key].value for key in adapter} == {"average"}
    assert not any("llm_adapter" in layer.module for layer in file_layout.layers)
    assert not any("llm_adapter" in x.key for x in norms_and_biases_of(header, file_layout))


def test_the_modulations_of_chroma_are_averaged():
    header, file_layout = layout(NARROW["chroma"]())
    guidance = [key for key in header.tensors if "distilled_guidance_layer" in key]
    assert len(guidance) == 4 + 5 * 5
    assert {file_layout.treatments[key].value for key in guidance} == {"average"}


def test_frozen_text_encoders_and_markers_are_copied():
    beside = {
        "text_encoders.qwen25_7b.transformer.model.norm.weight": (4,),
        UNET + "__index_timestep_zero__": (0,),
    }
    _, file_layout = layout({**NARROW["qwen_image_edit_2511"](), **beside})
    assert {file_layout.treatments[key].value for key in beside} == {"copy"}
