import pickle

import pytest
import torch

from hyper_merge.checkpoints.family import FAMILIES, identify, require_supported
from hyper_merge.checkpoints.header import TensorInfo
from hyper_merge.checkpoints.layers import layout_of
from hyper_merge.checkpoints.synthetic_layout import sd1_layout
from hyper_merge.errors import FamilyError

UNET = "model.diffusion_model."
CLIP = "cond_stage_model.transformer.text_model."
FIRST = UNET + "input_blocks.0.0.weight"


def renamed(shapes, old, new):
    return {key.replace(old, new): shape for key, shape in shapes.items()}


def parts(shapes, *prefixes):
    return {key: shape for key, shape in shapes.items() if key.startswith(prefixes)}


def with_channels(shapes, channels):
    return {**shapes, FIRST: (shapes[FIRST][0], channels, 3, 3)}


def labelled(shapes):
    return {**shapes, UNET + "label_emb.0.0.weight": (8, 8)}


def xl(narrow):
    """The signs of SDXL on the blocks of SD 1.x: families are told by structure, not by width."""
    first = renamed(narrow, "cond_stage_model.", "conditioner.embedders.0.")
    return labelled({**first, "conditioner.embedders.1.model.ln_final.weight": (16,)})


def open_clip(narrow, prefix="cond_stage_model.model."):
    unet_and_vae = parts(narrow, UNET, "first_stage_model.")
    return {**unet_and_vae, prefix + "transformer.resblocks.0.attn.in_proj_weight": (48, 16)}


VARIANTS = {
    "sd1": lambda s: s,
    "sd1_inpainting": lambda s: with_channels(s, 9),
    "sd1_pix2pix": lambda s: with_channels(s, 8),
    "sd1_old_keys": lambda s: renamed(s, CLIP, CLIP.removesuffix("text_model.")),
    "sd1_pruned": lambda s: {k: v for k, v in s.items() if "middle_block.1" not in k},
    "sd2": open_clip,
    "sd2_inpainting": lambda s: with_channels(open_clip(s), 9),
    "sd2_depth": lambda s: with_channels(open_clip(s), 5),
    "sd2_upscaler": lambda s: with_channels(open_clip(s), 7),
    "sd2_unclip": lambda s: labelled(open_clip(s)),
    "sdxl": xl,
    "sdxl_inpainting": lambda s: with_channels(xl(s), 9),
    "sdxl_pix2pix": lambda s: with_channels(xl(s), 8),
    "sdxl_pruned": lambda s: {k: v for k, v in xl(s).items() if "middle_block.1" not in k},
    "sdxl_refiner": lambda s: labelled(open_clip(s, "conditioner.embedders.0.model.")),
    "sd3": lambda s: {UNET + "joint_blocks.0.x_block.attn.qkv.weight": (9, 3)},
    "flux": lambda s: {"double_blocks.0.img_attn.qkv.weight": (9, 3)},
    "alt_diffusion": lambda s: renamed(
        s, "cond_stage_model.transformer.", "cond_stage_model.roberta."
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_is_told_from_narrow_keys(make_header, narrow, name):
    assert identify(make_header(VARIANTS[name](narrow))).name == name


def test_every_known_family_has_its_variant_here():
    assert {family.name for family in FAMILIES} == set(VARIANTS)


def test_sd2_in_the_spelling_of_sgm_is_not_taken_for_the_refiner(make_header, narrow):
    shapes = open_clip(narrow, "conditioner.embedders.0.model.")
    assert identify(make_header(shapes)).name == "sd2"


def test_the_full_width_is_the_same_family(make_header):
    assert identify(make_header(sd1_layout())).name == "sd1"


def test_a_checkpoint_without_position_ids_or_vae_is_sd1(make_header, narrow):
    shapes = {key: shape for key, shape in narrow.items() if "position_ids" not in key}
    assert require_supported(make_header(shapes)).name == "sd1"
    assert require_supported(make_header(parts(shapes, UNET, CLIP))).name == "sd1"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_only_sd1_is_supported_and_the_others_refused_by_title(make_header, narrow, family):
    header = make_header(VARIANTS[family.name](narrow), name="X.safetensors")
    if family.name == "sd1":
        assert require_supported(header) is family
        return
    with pytest.raises(FamilyError) as refusal:
        require_supported(header)
    assert str(refusal.value) == (
        f"X.safetensors is a {family.title} checkpoint;"
        " Hyper-Merge handles Stable Diffusion 1.x so far"
    )


STRANGERS = {
    "lora": ({"lora_unet_a.lora_down.weight": (4, 8), "lora_unet_a.alpha": ()}, "a LoRA"),
    "peft": ({"unet.a.lora_A.weight": (4, 8)}, "a LoRA"),
    "loha": ({"lora_unet_a.hada_w1_a": (4, 8)}, "a LoRA"),
    "diffusers lora": ({"unet.a.processor.to_q_lora.up.weight": (4, 8)}, "a LoRA"),
    "embedding": ({"string_to_param.*": (4, 768)}, "a textual-inversion embedding"),
    "embedding 2": ({"emb_params": (4, 768)}, "a textual-inversion embedding"),
    "embedding xl": ({"clip_l": (4, 768), "clip_g": (4, 1280)}, "a textual-inversion embedding"),
    "embedding diffusers": ({"<cat>": (768,)}, "a textual-inversion embedding"),
    "controlnet": ({"control_model.input_hint_block.0.weight": (4, 4, 3, 3)}, "a ControlNet"),
    "controlnet 2": ({"controlnet_cond_embedding.conv_in.weight": (4, 3, 3, 3)}, "a ControlNet"),
    "ip-adapter": ({"ip_adapter.1.to_k_ip.weight": (4, 4)}, "an IP-Adapter"),
    "motion": ({"down_blocks.0.motion_modules.0.x.weight": (4, 4)}, "an AnimateDiff motion module"),
    "diffusers unet": (
        {"down_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3), "conv_in.weight": (4, 4, 3, 3)},
        "a part of a diffusers model",
    ),
    "diffusers vae": (
        {"encoder.conv_in.weight": (4, 3, 3, 3), "encoder.down_blocks.0.x.weight": (4, 4)},
        "a part of a diffusers model",
    ),
    "clip": ({"text_model.encoder.layers.0.mlp.fc1.weight": (4, 4)}, "a text encoder alone"),
    "t5": ({"encoder.block.0.layer.0.SelfAttention.q.weight": (4, 4)}, "a text encoder alone"),
    "vision": ({"vision_model.encoder.layers.0.mlp.fc1.weight": (4, 4)}, "a CLIP vision model"),
    "esrgan": ({"model.1.sub.0.RDB1.conv1.0.weight": (4, 4, 3, 3)}, "an upscaler"),
    "realesrgan": ({"params_ema.conv_first.weight": (4, 3, 3, 3)}, "an upscaler"),
    "unknown": (
        {"one": (1,), "two": (1,), "three": (1,), "four": (1,)},
        r"of no architecture that Hyper-Merge knows \(first keys: one, two, three\)",
    ),
    "nothing": ({}, "first keys: none"),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_what_is_no_checkpoint_is_refused_by_name(make_header, kind):
    shapes, text = STRANGERS[kind]
    with pytest.raises(FamilyError, match=f"^y.safetensors is .*{text}"):
        identify(make_header(shapes, name="y.safetensors"))


def test_parts_of_a_checkpoint_are_refused_by_name(make_header, narrow):
    vae = parts(narrow, "first_stage_model.")
    xl_parts = {k: v for k, v in xl(narrow).items() if "embedders.1" not in k}
    for shapes, text in (
        (parts(narrow, UNET), "a UNet alone"),
        (renamed(parts(narrow, UNET), UNET, ""), "a UNet alone"),
        (parts(narrow, UNET, "first_stage_model."), "a UNet alone"),
        (vae, "a VAE alone"),
        (renamed(vae, "first_stage_model.", ""), "a VAE alone"),
        (parts(narrow, CLIP), "a text encoder alone"),
        (xl_parts, "XL checkpoint without its second text encoder"),
        ({**narrow, "control_model.zero_convs.0.0.weight": (4, 4, 1, 1)}, "a ControlNet"),
    ):
        with pytest.raises(FamilyError, match=text):
            identify(make_header(shapes))


def test_quantised_checkpoints_are_refused(make_header, narrow):
    weight = UNET + "input_blocks.1.1.proj_in.weight"
    for extra, text in (
        (weight + ".absmax", "quantised"),
        (weight + ".quant_state.bitsandbytes__nf4", "quantised"),
        ("scaled_fp8", "fp8 model with separate scales"),
    ):
        with pytest.raises(FamilyError, match=text):
            identify(make_header({**narrow, extra: (2,)}))
    header = make_header(narrow)
    integers = {**header.tensors, weight: TensorInfo(torch.int8, (32, 32, 1, 1))}
    with pytest.raises(FamilyError, match=r"stores 1 tensors .*proj_in.weight as int8"):
        require_supported(type(header)(header.path, integers, {}, 0, 0))
    with pytest.raises(FamilyError, match=r"stores 1 tensors .*z as F4"):
        require_supported(type(header)(header.path, header.tensors, {}, 0, 0, {"z": "F4"}))


def test_the_real_families_of_fp8_and_fp32_files_are_supported(make_header, narrow):
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32):
        assert require_supported(make_header(narrow, dtype=dtype)).name == "sd1"


def test_a_layout_can_be_sent_to_another_process(make_header, narrow):
    header = make_header(narrow)
    layout = layout_of(header, identify(header))
    assert pickle.loads(pickle.dumps(layout)) == layout


def test_sd1_says_of_itself_what_lora_files_need():
    (sd1,) = [family for family in FAMILIES if family.name == "sd1"]
    assert (sd1.ss_base_model_version, sd1.ss_v2, sd1.sd_version) == ("sd_v1", "False", "SD1")
    assert sd1.modelspec_architecture == "stable-diffusion-v1"
    assert sd1.modelspec_resolution == "512x512"
