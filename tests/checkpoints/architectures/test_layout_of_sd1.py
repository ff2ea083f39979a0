from collections import Counter

import pytest
import torch

from hyper_merge.checkpoints.architectures.detection import detect_family
from hyper_merge.checkpoints.architectures.layout import (
    Layer,
    Treatment,
    is_position_ids,
    kind_of_tensor,
    layout_of,
    output_tensors,
    position_ids,
)
from hyper_merge.checkpoints.architectures.lora_modules import diffusers_unet_path
from hyper_merge.checkpoints.io.header import TensorInfo
from hyper_merge.synthetic.checkpoint_layouts import sd1_layout

UNET = "model.diffusion_model."
CLIP = "cond_stage_model.transformer.text_model."
IDS = CLIP + "embeddings.position_ids"

# One pair for each rule of naming, written by hand from diffusers' and kohya's own names.
NAMES = {
    UNET + "input_blocks.1.0.in_layers.2.weight": "lora_unet_down_blocks_0_resnets_0_conv1",
    UNET + "input_blocks.4.0.skip_connection.weight": (
        "lora_unet_down_blocks_1_resnets_0_conv_shortcut"
    ),
    UNET + "input_blocks.5.0.emb_layers.1.weight": (
        "lora_unet_down_blocks_1_resnets_1_time_emb_proj"
    ),
    UNET + "input_blocks.9.0.op.weight": "lora_unet_down_blocks_2_downsamplers_0_conv",
    UNET + "input_blocks.11.0.out_layers.3.weight": "lora_unet_down_blocks_3_resnets_1_conv2",
    UNET + "input_blocks.8.1.proj_in.weight": "lora_unet_down_blocks_2_attentions_1_proj_in",
    UNET + "middle_block.0.in_layers.2.weight": "lora_unet_mid_block_resnets_0_conv1",
    UNET + "middle_block.2.out_layers.3.weight": "lora_unet_mid_block_resnets_1_conv2",
    UNET + "middle_block.1.transformer_blocks.0.attn2.to_out.0.weight": (
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0"
    ),
    UNET + "output_blocks.2.1.conv.weight": "lora_unet_up_blocks_0_upsamplers_0_conv",
    UNET + "output_blocks.8.2.conv.weight": "lora_unet_up_blocks_2_upsamplers_0_conv",
    UNET + "output_blocks.10.0.in_layers.2.weight": "lora_unet_up_blocks_3_resnets_1_conv1",
    UNET + "output_blocks.3.1.transformer_blocks.0.ff.net.0.proj.weight": (
        "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj"
    ),
    CLIP + "encoder.layers.11.self_attn.out_proj.weight": (
        "lora_te_text_model_encoder_layers_11_self_attn_out_proj"
    ),
    CLIP + "encoder.layers.0.mlp.fc1.weight": "lora_te_text_model_encoder_layers_0_mlp_fc1",
}


def layout_for(make_header, shapes, dtype=torch.float16):
    header = make_header(shapes, dtype=dtype)
    return header, layout_of(header, detect_family(header))


class DiffusersUNet:
    """Module names and weight shapes, walked through diffusers' UNet2DConditionModel, not LDM's."""

    def __init__(self, width, context):
        self.modules = {}
        self.embedding, self.context = 4 * width, context
        self.sizes = [width, 2 * width, 4 * width, 4 * width]
        self.skips, self.current = [width], width
        for level, size in enumerate(self.sizes):
            self.down(f"down_blocks.{level}", level, size)
        self.resnet("mid_block.resnets.0", self.current, self.current)
        self.attention("mid_block.attentions.0", self.current)
        self.resnet("mid_block.resnets.1", self.current, self.current)
        for level, size in enumerate(reversed(self.sizes)):
            self.up(f"up_blocks.{level}", level, size)

    def down(self, name, level, size):
        for index in range(2):
            self.resnet(f"{name}.resnets.{index}", self.current, size)
            self.skips.append(size)
            if level < 3:
                self.attention(f"{name}.attentions.{index}", size)
        if level < 3:
            self.modules[f"{name}.downsamplers.0.conv"] = (size, size, 3, 3)
            self.skips.append(size)

    def up(self, name, level, size):
        for index in range(3):
            self.resnet(f"{name}.resnets.{index}", self.current + self.skips.pop(), size)
            if level > 0:
                self.attention(f"{name}.attentions.{index}", size)
        if level < 3:
            self.modules[f"{name}.upsamplers.0.conv"] = (size, size, 3, 3)

    def resnet(self, name, inputs, outputs):
        self.modules[f"{name}.conv1"] = (outputs, inputs, 3, 3)
        self.modules[f"{name}.time_emb_proj"] = (outputs, self.embedding)
        self.modules[f"{name}.conv2"] = (outputs, outputs, 3, 3)
        if inputs != outputs:
            self.modules[f"{name}.conv_shortcut"] = (outputs, inputs, 1, 1)
        self.current = outputs

    def attention(self, name, size):
        modules = self.modules
        modules[f"{name}.proj_in"] = modules[f"{name}.proj_out"] = (size, size, 1, 1)
        for kind, source in (("attn1", size), ("attn2", self.context)):
            for part, inputs in (("q", size), ("k", source), ("v", source), ("out.0", size)):
                modules[f"{name}.transformer_blocks.0.{kind}.to_{part}"] = (size, inputs)
        modules[f"{name}.transformer_blocks.0.ff.net.0.proj"] = (8 * size, size)
        modules[f"{name}.transformer_blocks.0.ff.net.2"] = (size, 4 * size)


@pytest.mark.parametrize("width", [320, 32])
def test_sd1_has_278_unet_and_72_text_encoder_layers(make_header, width):
    _, layout = layout_for(make_header, sd1_layout(width=width))
    layers = [layer for layer in layout.layers if not layer.is_end]
    assert Counter(layer.part for layer in layers) == {"unet": 278, "text_encoder": 72}
    assert len({layer.module for layer in layers}) == 350
    unet = [layer for layer in layers if layer.part == "unet"]
    assert Counter(layer.kernel for layer in unet) == {None: 182, (1, 1): 46, (3, 3): 50}


@pytest.mark.parametrize(("width", "context"), [(320, 768), (32, 48)])
def test_names_and_shapes_are_those_of_diffusers_own_unet(make_header, width, context):
    _, layout = layout_for(make_header, sd1_layout(width=width, context=context))
    ours = {
        layer.module: layer.shape for layer in layout.without_ends().layers if layer.part == "unet"
    }
    expected = DiffusersUNet(width, context).modules
    assert ours == {"lora_unet_" + name.replace(".", "_"): expected[name] for name in expected}


@pytest.mark.parametrize("key", NAMES)
def test_names_follow_the_rules(make_header, narrow, key):
    _, layout = layout_for(make_header, narrow)
    assert {layer.key: layer.module for layer in layout.layers}[key] == NAMES[key]


def test_text_encoder_names_are_kohyas(make_header, narrow):
    _, layout = layout_for(make_header, narrow)
    parts = ["self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj"]
    expected = {
        f"lora_te_text_model_encoder_layers_{layer}_{part}"
        for layer in range(12)
        for part in (*parts, "mlp_fc1", "mlp_fc2")
    }
    assert {layer.module for layer in layout.layers if layer.part == "text_encoder"} == expected


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("input_blocks.0.0", "conv_in"),
        ("out.2", "conv_out"),
        ("out.0", "conv_norm_out"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("label_emb.0.0", "add_embedding.linear_1"),
        ("input_blocks.1.0.in_layers.0", "down_blocks.0.resnets.0.norm1"),
        ("output_blocks.11.1.norm", "up_blocks.3.attentions.2.norm"),
        ("somewhere.else", None),
        ("input_blocks.1.0.something", None),
        ("middle_block.3.in_layers.2", None),
    ],
)
def test_unet_paths_beyond_the_layers_have_diffusers_names_too(path, name):
    assert diffusers_unet_path(path) == name


def test_layers_come_in_the_order_of_the_network(make_header, narrow):
    shuffled = dict(sorted(narrow.items()))  # 10 before 2
    _, layout = layout_for(make_header, shuffled)
    modules = [layer.module for layer in layout.layers]
    places = [
        modules.index(name)
        for name in (
            "lora_te_text_model_encoder_layers_2_mlp_fc1",
            "lora_te_text_model_encoder_layers_10_mlp_fc1",
            "lora_unet_down_blocks_0_resnets_1_conv1",
            "lora_unet_down_blocks_3_resnets_0_conv1",
            "lora_unet_mid_block_resnets_0_conv1",
            "lora_unet_up_blocks_0_resnets_2_conv1",
            "lora_unet_up_blocks_3_resnets_1_conv1",
        )
    ]
    assert places == sorted(places)


def test_a_layer_knows_the_shapes_of_its_factors():
    linear = Layer("k", "m", "unet", (6, 4))
    assert (linear.m, linear.n, linear.kernel) == (6, 4, None)
    assert (linear.up_shape(2), linear.down_shape(2)) == ((6, 2), (2, 4))
    convolution = Layer("k", "m", "unet", (6, 4, 3, 3))
    assert (convolution.m, convolution.n, convolution.kernel) == (6, 36, (3, 3))
    assert convolution.up_shape(2) == (6, 2, 1, 1)
    assert convolution.down_shape(2) == (2, 4, 3, 3)


def test_projections_stored_as_matrices_have_the_loaders_shape(make_header, narrow):
    key = UNET + "input_blocks.1.1.proj_in.weight"
    header, layout = layout_for(make_header, {**narrow, key: narrow[key][:2]})
    (layer,) = [layer for layer in layout.layers if layer.key == key]
    assert layer.shape == narrow[key]
    assert output_tensors(header, layout, torch.float16)[key].shape == narrow[key][:2]


ODD = {
    "model_ema.decay": Treatment.DROP,
    "model_ema.diffusion_modelinput_blocks00weight": Treatment.DROP,
    "first_stage_model.loss.logvar": Treatment.DROP,
    "alphas_cumprod": Treatment.COPY,
    "v_pred": Treatment.COPY,
    "cond_stage_model.logit_scale": Treatment.COPY,
    CLIP + "logit_scale": Treatment.COPY,
    UNET + "empty": Treatment.COPY,
    "denoiser.sigmas": Treatment.COPY,
    "cond_stage_model.transformer.text_projection.weight": Treatment.COPY,
    "somebody.elses.weight": Treatment.COPY,
    UNET + "input_blocks.0.0.weight": Treatment.LAYER,
    UNET + "input_blocks.0.0.bias": Treatment.AVERAGE,
    UNET + "out.0.weight": Treatment.AVERAGE,
    UNET + "out.2.weight": Treatment.LAYER,
    UNET + "time_embed.0.weight": Treatment.LAYER,
    UNET + "input_blocks.1.0.in_layers.2.bias": Treatment.AVERAGE,
    UNET + "input_blocks.1.0.in_layers.2.weight": Treatment.LAYER,
    CLIP + "embeddings.token_embedding.weight": Treatment.AVERAGE,
    "first_stage_model.decoder.conv_in.weight": Treatment.VAE,
    IDS: Treatment.COPY,
}


@pytest.mark.parametrize("key", ODD)
def test_what_becomes_of_a_tensor(make_header, narrow, key):
    shape = (0,) if key in ("v_pred", UNET + "empty") else narrow.get(key, (4,))
    _, layout = layout_for(make_header, {**narrow, key: shape})
    assert layout.treatments[key] is ODD[key]


def test_spoilt_position_ids_are_still_told_by_name(make_header, narrow):
    header = make_header(narrow)
    header = type(header)(
        header.path, {**header.tensors, IDS: TensorInfo(torch.float16, (1, 77))}, {}, 0, 0
    )
    layout = layout_of(header, detect_family(header))
    assert layout.treatments[IDS] is Treatment.COPY
    assert output_tensors(header, layout, torch.float16)[IDS] == TensorInfo(torch.int64, (1, 77))
    assert is_position_ids(IDS)
    ids = position_ids((1, 77))
    assert ids.tolist() == [list(range(77))]
    assert ids.dtype == torch.int64


def test_every_averaged_tensor_has_a_kind(make_header, narrow):
    _, layout = layout_for(make_header, {**narrow, "model_ema.decay": ()})
    kinds = Counter(kind_of_tensor(key, layout) for key in layout.treatments)
    assert kinds == {
        "layers": 350 + 4,
        "norms": 2 * (109 + 25),
        "biases": 258,
        "VAE": 248,
        "embeddings": 2,
        "copied": 1,
        "dropped": 1,
    }
    assert kind_of_tensor(UNET + "out.0.weight", layout) == "norms"
    biased = UNET + "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.bias"
    assert kind_of_tensor(biased, layout) == "biases"


def test_the_output_has_one_type_and_no_leftovers(make_header, narrow):
    shapes = {**narrow, "model_ema.decay": (), "alphas_cumprod": (1000,), "v_pred": (0,)}
    header, layout = layout_for(make_header, shapes, dtype=torch.float32)
    tensors = output_tensors(header, layout, torch.bfloat16)
    assert set(shapes) - set(tensors) == {"model_ema.decay"}
    assert tensors["alphas_cumprod"] == TensorInfo(torch.float32, (1000,))
    assert tensors["v_pred"] == TensorInfo(torch.float32, (0,))
    assert tensors[IDS] == TensorInfo(torch.int64, (1, 77))
    others = set(tensors) - {"alphas_cumprod", "v_pred", IDS}
    assert {tensors[key].dtype for key in others} == {torch.bfloat16}
    assert all(tensors[key].shape == shapes[key] for key in others)


def test_schedules_that_were_cast_are_left_out(make_header, narrow):
    names = ("alphas_cumprod", "betas", "sqrt_recip_alphas_cumprod", "posterior_mean_coef1")
    shapes = {**narrow, **dict.fromkeys(names, (1000,)), "log_one_minus_alphas_cumprod": (1000,)}
    header, layout = layout_for(make_header, shapes, dtype=torch.float16)
    assert set(output_tensors(header, layout, torch.float16)) == set(narrow)
