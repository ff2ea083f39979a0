"""Layers know how often one run of the network applies them."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from hyper_merge.checkpoints.architectures.detection import require_supported
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.checkpoints.io.header import Header, TensorInfo
from hyper_merge.synthetic.checkpoint_layouts import sd1_layout, sdxl_layout
from hyper_merge.synthetic.family_layouts import flux_layout

SD1 = {
    "down_blocks_0_resnets_0_conv1": 64**2,
    "down_blocks_0_downsamplers_0_conv": 32**2,
    "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q": 32**2,
    "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": 77,
    "down_blocks_1_resnets_0_time_emb_proj": 1,
    "down_blocks_3_resnets_1_conv2": 8**2,
    "mid_block_attentions_0_proj_in": 8**2,
    "up_blocks_0_upsamplers_0_conv": 16**2,
    "up_blocks_1_resnets_0_conv1": 16**2,
    "up_blocks_3_resnets_2_conv_shortcut": 64**2,
}
SDXL = {
    "input_blocks_1_0_in_layers_2": 128**2,
    "input_blocks_6_0_op": 32**2,
    "middle_block_1_transformer_blocks_9_ff_net_2": 32**2,
    "output_blocks_2_2_conv": 64**2,
    "output_blocks_8_0_out_layers_3": 128**2,
}
FLUX = {
    "double_blocks_0_img_mod_lin": 1,
    "double_blocks_0_img_attn_qkv": 64**2,
    "double_blocks_0_txt_attn_qkv": 77 + 256,
    "single_blocks_37_linear1": 64**2 + 77 + 256,
    "single_blocks_37_modulation_lin": 1,
}


def layers(shapes):
    """Returns the layers of a family's checkpoint by module, without their LoRA prefix."""
    tensors = {key: TensorInfo(torch.float16, shape) for key, shape in shapes.items()}
    header = Header(Path("a.safetensors"), tensors, {}, 0, 0)
    layout = layout_of(header, require_supported(header))
    return {layer.module.removeprefix("lora_unet_"): layer for layer in layout.layers}


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [(sd1_layout(), SD1), (sdxl_layout(), SDXL), (flux_layout(), FLUX)],
    ids=["sd1", "sdxl", "flux"],
)
def test_layers_are_applied_at_so_many_positions(shapes, expected):
    known = layers(shapes)
    assert {module: known[module].positions for module in expected} == expected


def test_every_layer_of_a_text_encoder_reads_all_tokens():
    counts = Counter(
        layer.positions for layer in layers(sdxl_layout()).values() if layer.part == "text_encoder"
    )
    assert counts.keys() == {77}
