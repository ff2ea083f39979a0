"""Shapes that contradict each other within one file are refused by key, for every family."""

import pytest
from narrow_layouts import FULL, NARROW, UNET, other_way_round, two

from hyper_merge.checkpoints.architectures.detection import require_supported
from hyper_merge.checkpoints.architectures.key_conversion import with_standard_keys
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.errors import FamilyError

CLIP = "cond_stage_model.transformer.text_model."
ATTENTION = "middle_block.1.transformer_blocks.0.attn1."
OPEN_CLIP = "cond_stage_model.model.transformer.resblocks."
FLUX_CLIP = "text_encoders.clip_l.transformer.text_model.encoder.layers.0."


@pytest.mark.parametrize("name", FULL)
def test_real_shapes_agree(make_header, name):
    assert require_supported(make_header(FULL[name]())).name == name


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_projections_of_the_other_shape_agree(make_header, name):
    header = with_standard_keys(make_header(other_way_round(NARROW[name]())))
    assert require_supported(header).name == name


@pytest.mark.parametrize(
    ("family", "key", "shape"),
    [
        ("sd2", OPEN_CLIP + "0.attn.in_proj_weight", (64, 24)),
        ("sd2", OPEN_CLIP + "0.attn.in_proj_weight", (72,)),
        (
            "sdxl",
            "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
            (9, 4),
        ),
        ("sd1", UNET + ATTENTION + "to_q.weight", (48, 64)),
        ("sd1", UNET + "input_blocks.1.0.in_layers.2.weight", (17, 16, 3, 3)),
        ("sd1", UNET + "input_blocks.1.1.norm.weight", (3,)),
        ("sd1", CLIP + "encoder.layers.0.self_attn.k_proj.weight", (23, 24)),
        ("sd1", "first_stage_model.decoder.conv_in.weight", (3, 4, 3, 3)),
        ("flux_dev", UNET + "double_blocks.0.img_attn.qkv.weight", (8, 8)),
        ("flux_dev", UNET + "single_blocks.0.linear2.weight", (8, 8, 8)),
        ("sd3_medium", UNET + "joint_blocks.0.x_block.attn.qkv.weight", (36,)),
    ],
)
def test_contradicting_shapes_are_refused_by_key(make_header, family, key, shape):
    shapes = NARROW[family]()
    assert key in shapes
    bias = key.removesuffix("weight") + "bias"
    header = make_header({**shapes, key: shape})
    with pytest.raises(FamilyError) as refusal:
        require_supported(header)
    assert (refusal.value.key, refusal.value.file) == (key, header.path)
    assert f"a.safetensors contradicts itself: {key} has the shape {list(shape)}" in str(
        refusal.value
    )
    without_bias = {k: s for k, s in shapes.items() if k != bias}
    if len(shape) == 2:  # by other tensors than the bias
        with pytest.raises(FamilyError, match="contradicts itself"):
            require_supported(make_header({**without_bias, key: shape}))


@pytest.mark.parametrize("name", NARROW)
def test_an_empty_layer_is_refused_by_key(make_header, name):
    header = make_header(NARROW[name]())
    layers = layout_of(header, require_supported(header)).layers
    for key in {layers[-1].key, next((x.key for x in layers if x.rows), layers[-1].key)}:
        rows, *columns = header.tensors[key].shape
        for shape in ((0, *columns), (rows, 0)):
            damaged = make_header({**NARROW[name](), key: shape})
            with pytest.raises(FamilyError, match=r"contradicts itself.*holds nothing") as refusal:
                require_supported(damaged)
            assert refusal.value.key == key


def test_what_never_runs_may_have_any_shape(make_header):
    idle = {OPEN_CLIP + "23.attn.in_proj_weight": (), OPEN_CLIP + "23.ln_1.weight": (1,)}
    assert require_supported(make_header({**two(), **idle})).name == "sd2"
