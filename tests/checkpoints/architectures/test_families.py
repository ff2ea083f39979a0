import math
import pickle
import time
from pathlib import Path

import pytest
import torch
from narrow_layouts import FULL, NARROW, UNET, one, parts, renamed, two, without, xl

from hyper_merge.checkpoints.architectures.detection import (
    FAMILIES,
    detect_family,
    require_supported,
)
from hyper_merge.checkpoints.architectures.families import KINDS
from hyper_merge.checkpoints.architectures.key_conversion import with_standard_keys
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.checkpoints.io.header import TensorInfo
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import FamilyError

CLIP = "cond_stage_model.transformer.text_model."
OPEN_CLIP = "cond_stage_model.model."
SGM = "conditioner.embedders.0.model."
LABELS = {UNET + "label_emb.0.0.weight": (8, 8)}

PREFIXES = ("net.", "diffusion_model.", "model.model.")
TRANSFORMERS = {name for name in FULL if not name.startswith("sd")}

UNSUPPORTED = {
    "sd1_pruned": lambda: without(one(), "middle_block.1"),
    "sd2_pruned": lambda: without(two(), "output_blocks", "input_blocks.6"),
    "sdxl_pruned": lambda: without(xl(), "middle_block.1", "transformer_blocks.4"),
    "sd2_upscaler": lambda: two(input_channels=7),
    "sd2_unclip": lambda: {**two(), **LABELS},
    "chroma_radiance": lambda: {**NARROW["chroma"](), UNET + "nerf_blocks.0.norm.scale": (4,)},
    "z_image_omni": lambda: {**NARROW["z_image"](), UNET + "siglip_embedder.0.weight": (4,)},
    "z_image_pixel": lambda: {**NARROW["z_image"](), UNET + "dec_net.cond_embed.weight": (4, 4)},
    "newbie": lambda: {**NARROW["lumina_2"](), UNET + "clip_text_pooled_proj.0.weight": (4,)},
    "cosmos_predict2": lambda: without(NARROW["anima"](), "llm_adapter"),
    "qwen_image_layered": lambda: {
        **NARROW["qwen_image"](),
        UNET + "time_text_embed.addition_t_embedding.weight": (2, 8),
    },
    "wan_extended": lambda: {**NARROW["wan"](), UNET + "vace_patch_embedding.weight": (8, 4)},
    "alt_diffusion": lambda: renamed(one(), CLIP, "cond_stage_model.roberta."),
}


@pytest.mark.parametrize("name", {**NARROW, **UNSUPPORTED})
def test_every_family_is_told_from_narrow_keys(make_header, name):
    assert detect_family(make_header({**NARROW, **UNSUPPORTED}[name]())).name == name


@pytest.mark.parametrize("name", FULL)
def test_the_full_width_is_the_same_family(make_header, name):
    assert require_supported(make_header(FULL[name]())).name == name


def test_every_known_family_has_its_variant_here():
    assert {f.name for f in FAMILIES if f.supported} == set(NARROW) == set(FULL)
    assert {f.name for f in FAMILIES if not f.supported} == set(UNSUPPORTED)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_family_is_refused_by_title(make_header, name):
    (family,) = [family for family in FAMILIES if family.name == name]
    with pytest.raises(FamilyError) as refusal:
        require_supported(make_header(UNSUPPORTED[name](), name="X.safetensors"))
    assert str(refusal.value) == (
        f"X.safetensors is a {family.title} checkpoint, which cannot be merged;"
        f" choose checkpoints of {KINDS}"
    )


@pytest.mark.parametrize("name", FULL)
def test_a_network_alone_of_full_size_is_still_told(make_header, name):
    alone = parts(FULL[name](), UNET, "edm_")
    assert require_supported(make_header(alone)).name == name
    prefixes = ["", *(PREFIXES if name in TRANSFORMERS else ())]
    for prefix in prefixes:
        other = with_standard_keys(make_header(renamed(alone, UNET, prefix)))
        assert require_supported(other).name == name
        assert set(other.tensors) == set(alone)


def test_a_pruned_network_alone_is_told_too(make_header):
    shapes = parts(without(FULL["sdxl"](), "middle_block.1", "transformer_blocks.4"), UNET)
    assert detect_family(make_header(shapes)).name == "sdxl_pruned"


def test_a_checkpoint_without_position_ids_or_vae_is_sd1(make_header, narrow):
    shapes = {key: shape for key, shape in narrow.items() if "position_ids" not in key}
    assert require_supported(make_header(shapes)).name == "sd1"
    assert require_supported(make_header(parts(shapes, UNET, CLIP))).name == "sd1"


def test_sd2_in_the_spelling_of_sgm_is_no_refiner(make_header):
    converted = with_standard_keys(make_header(renamed(two(), OPEN_CLIP, SGM)))
    assert detect_family(converted).name == "sd2"
    assert set(converted.tensors) == set(two())
    refiner = make_header(NARROW["sdxl_refiner"]())
    assert with_standard_keys(refiner) == refiner


def test_old_text_encoder_keys_are_those_of_sd1(make_header, narrow):
    converted = with_standard_keys(
        make_header(renamed(narrow, CLIP, CLIP.removesuffix("text_model.")))
    )
    assert detect_family(converted).name == "sd1"
    assert set(converted.tensors) == set(narrow)


@pytest.mark.parametrize("name", FULL)
def test_detection_reads_the_header_only_within_50_ms(tmp_path, name, bytes_read):
    path = header_only(tmp_path / "x.safetensors", FULL[name]())
    took = [math.inf]
    while min(took) >= 0.05 and len(took) < 100:  # other programs may be at work
        start = time.process_time()
        assert require_supported(read_header(path)).name == name
        took.append(time.process_time() - start)
    length = bytes_read[1]
    assert bytes_read == [8, length] * (len(took) - 1)
    assert length < path.stat().st_size / 1000
    assert min(took) < 0.05


@pytest.fixture
def bytes_read(monkeypatch):
    """Sizes of all reads of files through `Path.open`; no other way to their content is open."""
    sizes, real = [], Path.open

    def forbidden(*arguments, **settings):
        raise AssertionError("tensor data is read")

    class Spy:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.stream.close()

        def read(self, size):
            sizes.append(size)
            return self.stream.read(size)

    def spied(path, mode="r", **settings):
        stream = real(path, mode, **settings)
        return Spy(stream) if mode == "rb" else stream

    monkeypatch.setattr("hyper_merge.checkpoints.io.safetensors_header.Path.open", spied)
    monkeypatch.setattr("hyper_merge.checkpoints.reader.MappedTensors", forbidden)
    return sizes


def header_only(path, shapes):
    """A real file's header before as many bytes of nothing, which take no space."""
    tensors = {
        key: TensorInfo(torch.int64 if key.endswith("position_ids") else torch.float16, shape)
        for key, shape in shapes.items()
    }
    writer = SafetensorsWriter(path, tensors, {})
    path.write_bytes(writer._header)
    with path.open("r+b") as stream:
        stream.truncate(writer.size)
    return path


STRANGERS = {
    "lora": ({"lora_unet_a.lora_down.weight": (4, 8), "lora_unet_a.alpha": ()}, "a LoRA"),
    "peft": ({"unet.a.lora_A.weight": (4, 8)}, "a LoRA"),
    "loha": ({"lora_unet_a.hada_w1_a": (4, 8)}, "a LoRA"),
    "diffusers lora": ({"unet.a.processor.to_q_lora.up.weight": (4, 8)}, "a LoRA"),
    "kohya flux lora": ({"lora_transformer_a.alpha": ()}, "a LoRA"),
    "flux lora": ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 8)}, "a LoRA"),
    "bfl lora": ({"diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight": (8, 4)}, "a LoRA"),
    "bare lora": ({"double_blocks.0.img_attn.qkv.lora_A.weight": (4, 8)}, "a LoRA"),
    "old diffusers lora": ({"text.q_proj.lora_linear_layer.up.weight": (8, 4)}, "a LoRA"),
    "embedding lora": ({"text.shared.lora_embedding_A": (4, 8)}, "a LoRA"),
    "lycoris full": ({"lycoris_a.diff": (8, 8)}, "a LoRA"),
    "flux full": ({"diffusion_model.a.diff": (8, 8), "diffusion_model.a.diff_b": (8,)}, "a LoRA"),
    "glora": ({"diffusion_model.a.a1.weight": (4, 8)}, "a LoRA"),
    "glora 2": ({"lycoris_a.b1.weight": (4, 8)}, "a LoRA"),
    "ia3": ({"transformer.a.weight": (8,), "transformer.a.on_input": ()}, "a LoRA"),
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
        detect_family(make_header(shapes, name="y.safetensors"))


def test_parts_of_a_checkpoint_are_refused_by_name(make_header, narrow):
    vae = parts(narrow, "first_stage_model.")
    averages = renamed(parts(narrow, UNET), UNET, "model_ema.diffusion_model")
    for shapes, text in (
        (parts(narrow, UNET), "a UNet alone of a kind that cannot be recognised"),
        (vae, "a VAE alone"),
        (renamed(vae, "first_stage_model.", ""), "a VAE alone"),
        (parts(narrow, CLIP), "a text encoder alone"),
        (without(xl(), "embedders.1"), "XL checkpoint without its second text encoder"),
        ({**narrow, "control_model.zero_convs.0.0.weight": (4, 4, 1, 1)}, "a ControlNet"),
        (averages, "nothing but training averages"),
        ({UNET + "input_blocks.1.1.time_stack.0.x": (4,), **vae}, "a video model"),
    ):
        with pytest.raises(FamilyError, match=text):
            detect_family(make_header(shapes))


# Keys that diffusers' own converters make of single-file checkpoints.
IN_DIFFUSERS_LAYOUT = {
    "flux": ("x_embedder", "single_transformer_blocks.3.attn.to_q"),
    "a later shard of flux": ("proj_out", "single_transformer_blocks.30.proj_mlp"),
    "sd3": ("pos_embed.proj", "transformer_blocks.0.attn.add_q_proj"),
    "z-image": (
        "all_x_embedder.2-1",
        "noise_refiner.0.attention.norm_q",
        "layers.0.attention.to_q",
    ),
    "lumina 2": ("x_embedder", "layers.0.attn.to_q"),
    "wan": ("condition_embedder.time_proj", "blocks.0.attn1.to_q"),
}


@pytest.mark.parametrize("model", IN_DIFFUSERS_LAYOUT)
def test_transformers_in_diffusers_layout_are_refused_with_a_way_to_convert(make_header, model):
    shapes = {f"{name}.weight": (4, 4) for name in IN_DIFFUSERS_LAYOUT[model]}
    with pytest.raises(FamilyError, match=r"a transformer in diffusers' layout.*ModelSave"):
        detect_family(with_standard_keys(make_header(shapes)))


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (".absmax", "a 4-bit model"),
        (".quant_state.bitsandbytes__nf4", "a 4-bit model"),
        (".SCB", "an 8-bit model of whole numbers"),
        (".qweight", "a quantised model"),
        (".wscales", "a quantised model"),
        (".weight_scale_2", "scales by block"),
        (".weight_scale", "scales by block"),
    ],
)
@pytest.mark.parametrize("name", ["sd1", "sdxl", "flux_dev"])
def test_quantised_checkpoints_are_refused_by_their_kind(make_header, name, end, text):
    shapes = {**NARROW[name](), UNET + "somewhere" + end: (2, 2)}
    with pytest.raises(FamilyError, match=text):
        detect_family(with_standard_keys(make_header(shapes)))


def test_whole_numbers_and_unknown_types_are_refused(make_header, narrow):
    weight = UNET + "input_blocks.1.1.proj_in.weight"
    header = make_header(narrow)
    integers = {**header.tensors, weight: TensorInfo(torch.int8, (32, 32, 1, 1))}
    with pytest.raises(FamilyError, match=r"stores 1 tensors .*proj_in.weight as int8"):
        require_supported(type(header)(header.path, integers, {}, 0, 0))
    with pytest.raises(FamilyError, match=r"stores 1 tensors .*z as F4"):
        require_supported(type(header)(header.path, header.tensors, {}, 0, 0, {"z": "F4"}))


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_a_vae_of_whole_numbers_is_refused(make_header, name):
    key = "first_stage_model.decoder.conv_in.weight"
    header = make_header(NARROW[name]())
    tensors = {**header.tensors, key: TensorInfo(torch.int8, header.tensors[key].shape)}
    with pytest.raises(FamilyError, match=rf"stores 1 tensors .*{key} as int8") as refusal:
        require_supported(type(header)(header.path, tensors, {}, 0, 0))
    assert refusal.value.key == key


def test_fp8_and_fp32_files_are_supported(make_header, narrow):
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32):
        assert require_supported(make_header(narrow, dtype=dtype)).name == "sd1"


@pytest.mark.parametrize("name", NARROW)
def test_a_layout_can_be_sent_to_another_process(make_header, name):
    header = make_header(NARROW[name]())
    layout = layout_of(header, detect_family(header))
    assert pickle.loads(pickle.dumps(layout)) == layout


def test_sd1_says_of_itself_what_lora_files_need():
    (sd1,) = [family for family in FAMILIES if family.name == "sd1"]
    assert (sd1.ss_base_model_version, sd1.ss_v2, sd1.sd_version) == ("sd_v1", "False", "SD1")
    assert sd1.modelspec_architecture == "stable-diffusion-v1"
    assert sd1.modelspec_resolution == "512x512"
