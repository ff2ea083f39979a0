"""Files in other spellings are read as if they had the usual one."""

import pytest
import torch
from narrow_layouts import NARROW, UNET, one, other_way_round, renamed, two, without
from safetensors.torch import save_file

from hyper_merge.checkpoints.architectures.detection import require_supported
from hyper_merge.checkpoints.architectures.key_conversion import with_standard_keys
from hyper_merge.checkpoints.reader import CheckpointReader, read_header
from hyper_merge.errors import FamilyError

KEY = UNET + "double_blocks.0.img_attn.qkv.weight"
STEM = KEY.removesuffix("weight")
FP8 = torch.float8_e4m3fn


def state(shapes, dtype=torch.float16):
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


def saved(path, tensors):
    save_file(tensors, path)
    return path


SPELLINGS = {
    "sd1": ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
    "sd2": ("cond_stage_model.model.", "conditioner.embedders.0.model."),
    "flux_dev": (UNET, ""),
    "sd3_medium": (UNET, ""),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_tensors_are_found_under_the_usual_keys(tmp_path, name):
    layout = NARROW[name]()
    usual_keys = {k: v.half() for k, v in state(layout).items()}
    other = {k.replace(*SPELLINGS[name], 1): t for k, t in usual_keys.items()}
    assert other.keys() != usual_keys.keys()
    with CheckpointReader(saved(tmp_path / "other.safetensors", other)) as checkpoint:
        assert set(checkpoint.header.tensors) == set(layout)
        for key, tensor in usual_keys.items():
            assert torch.equal(checkpoint.tensor(key), tensor)


@pytest.mark.parametrize("name", ["flux_dev", "flux_schnell"])
@pytest.mark.parametrize("prefix", [UNET, ""])
def test_flux_as_comfyui_saves_it_is_read_under_the_usual_keys(tmp_path, name, prefix):
    usual = state(NARROW[name](), torch.bfloat16)
    other = {
        k.replace("_norm.scale", "_norm.weight").replace(UNET, prefix): t for k, t in usual.items()
    }
    assert len(other.keys() - usual.keys()) >= 6
    with CheckpointReader(saved(tmp_path / "other.safetensors", other)) as checkpoint:
        assert require_supported(checkpoint.header).name == name
        assert set(checkpoint.header.tensors) == set(usual)
        for key, tensor in usual.items():
            assert torch.equal(checkpoint.tensor(key), tensor)


def test_norms_of_other_networks_keep_their_keys(make_header):
    layout = {**NARROW["flux_dev"](), "text_encoders.t5xxl.layer_norm.weight": (4,)}
    assert set(with_standard_keys(make_header(layout)).tensors) == set(layout)


def test_a_bare_network_keeps_the_other_keys(make_header):
    shapes = renamed(NARROW["flux_dev"](), UNET, "")
    beside = {"vae.decoder.conv_in.bias": (4,), "text_encoders.clip_l.transformer.x": (4,)}
    assert set(with_standard_keys(make_header({**shapes, **beside})).tensors) == {
        *(UNET + key for key in shapes),
        *beside,
    }


def test_a_file_with_both_spellings_stays_as_it_is(make_header):
    shapes = {**one(), **renamed(one(), "text_model.", "")}
    assert set(with_standard_keys(make_header(shapes)).tensors) == set(shapes)


@pytest.mark.parametrize("layout", [one, two])
def test_a_usual_file_has_no_other_names(make_header, layout):
    header = make_header(layout())
    assert with_standard_keys(header) is header


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("end", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("prefix", [UNET, ""])
def test_a_weight_with_a_scale_is_their_product(tmp_path, dtype, end, prefix):
    tensors = state(NARROW["flux_dev"](), torch.bfloat16)
    tensors[KEY] = tensors[KEY].to(dtype)
    scales = {STEM + end: torch.tensor(0.125), STEM + "scale_input": torch.tensor(2.0)}
    marks = {UNET + "scaled_fp8": torch.zeros(0).to(FP8)}
    every = {key.replace(UNET, prefix): t for key, t in {**tensors, **scales, **marks}.items()}
    path = saved(tmp_path / "scaled.safetensors", every)
    with CheckpointReader(path) as checkpoint:
        header = checkpoint.header
        assert set(header.tensors) == set(tensors)  # nothing of the scaling is left
        assert require_supported(header).name == "flux_dev"
        assert header.tensors[KEY].dtype == torch.float32
        assert torch.equal(checkpoint.tensor(KEY), tensors[KEY].float() * 0.125)


def test_every_row_has_its_scale(tmp_path):
    tensors = state(NARROW["flux_dev"](), torch.bfloat16)
    rows = torch.arange(1.0, len(tensors[KEY]) + 1)
    every = {**tensors, KEY: tensors[KEY].to(FP8), STEM + "weight_scale": rows[:, None]}
    with CheckpointReader(saved(tmp_path / "rows.safetensors", every)) as checkpoint:
        expected = tensors[KEY].to(FP8).float() * rows[:, None]
        assert torch.equal(checkpoint.tensor(KEY), expected)


def test_a_scale_for_each_block_is_refused(tmp_path):
    tensors = state(NARROW["flux_dev"](), torch.bfloat16)
    blocks = torch.ones(len(tensors[KEY]), 4)
    every = {**tensors, KEY: tensors[KEY].to(FP8), STEM + "weight_scale": blocks}
    header = read_header(saved(tmp_path / "blocks.safetensors", every))
    with pytest.raises(FamilyError, match="scales by block"):
        require_supported(header)


def test_a_header_of_no_known_spelling_stays(make_header):
    header = make_header(without(one(), "encoder.layers"))
    assert with_standard_keys(header) is header


PROJECTIONS = {
    "sdxl": "conditioner.embedders.1.model.text_projection",
    "sdxl_refiner": "conditioner.embedders.0.model.text_projection",
    "sd2": "cond_stage_model.model.text_projection",
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_text_projection_of_diffusers_is_transposed(tmp_path, name):
    key = PROJECTIONS[name]
    usual = state(NARROW[name]())
    usual[key] = torch.randn(6, 4).half()
    linear = {k: t for k, t in usual.items() if k != key}
    linear[key + ".weight"] = usual[key].mT.contiguous()
    with CheckpointReader(saved(tmp_path / "linear.safetensors", linear)) as checkpoint:
        header = checkpoint.header
        assert require_supported(header).name == name
        assert set(header.tensors) == set(usual)
        assert header.tensors[key].shape == (6, 4)
        for stored, tensor in usual.items():
            assert torch.equal(checkpoint.tensor(stored), tensor)


def test_a_transposed_projection_keeps_its_scales(tmp_path):
    key = PROJECTIONS["sdxl"]
    tensors = {k: t for k, t in state(NARROW["sdxl"]()).items() if k != key}
    weight, rows = torch.randn(6, 4).to(FP8), torch.arange(1.0, 7)[:, None]
    tensors |= {key + ".weight": weight, key + ".weight_scale": rows}
    with CheckpointReader(saved(tmp_path / "scaled.safetensors", tensors)) as checkpoint:
        assert torch.equal(checkpoint.tensor(key), (weight.float() * rows).mT)


def test_both_text_projections_stay_as_they_are(make_header):
    key = PROJECTIONS["sdxl"]
    shapes = {**NARROW["sdxl"](), key: (4, 4), key + ".weight": (4, 4)}
    assert set(with_standard_keys(make_header(shapes)).tensors) == set(shapes)


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_projections_are_read_in_the_standard_shape(tmp_path, name):
    layout = NARROW[name]()
    stored = state(other_way_round(layout))
    assert {key: tuple(tensor.shape) for key, tensor in stored.items()} != layout
    with CheckpointReader(saved(tmp_path / "other.safetensors", stored)) as checkpoint:
        for key, shape in layout.items():
            assert tuple(checkpoint.tensor(key).shape) == shape
            assert torch.equal(checkpoint.tensor(key).flatten(), stored[key].flatten())


def test_a_network_alone_keeps_its_markers(make_header):
    markers = {"v_pred": (0,), "ztsnr": (0,)}
    bare = {**renamed(NARROW["sdxl_edm"](), UNET, ""), **markers}
    shapes = with_standard_keys(make_header(bare)).tensors
    assert {"v_pred", "ztsnr", "edm_mean"} < set(shapes)
