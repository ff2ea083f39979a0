"""diffusers' own classes at full size, without memory, and its converters for transformers."""

import warnings

import pytest
import torch
from narrow_layouts import FULL, UNET

from hyper_merge.checkpoints.architectures.detection import detect_family
from hyper_merge.checkpoints.architectures.layout import layout_of, output_tensors
from hyper_merge.checkpoints.io.header import Header, TensorInfo

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries, on being imported
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders import lora_conversion_utils, single_file_utils

XL_BLOCKS = {
    "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
    "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS = {
    "sd1": {"cross_attention_dim": 768},
    "sd2": {"cross_attention_dim": 1024, "use_linear_projection": True},
    "sdxl": {**XL_BLOCKS, "use_linear_projection": True},
}
ENDS = ("conv_in", "conv_out", "time_embedding", "add_embedding")


def layout(shapes):
    header = Header(
        "x.safetensors",
        {
            key: TensorInfo(torch.int64 if key.endswith("_ids") else torch.float16, shape)
            for key, shape in shapes.items()
        },
        {},
        0,
        0,
    )
    return header, layout_of(header, detect_family(header))


def on_meta(kind, **config):
    with torch.device("meta"):
        return kind(**config)


def written(name):
    """Returns the tensors of a family's hyper-model at full size, without memory."""
    tensors = output_tensors(*layout(FULL[name]()), torch.float16)
    return {k: torch.empty(info.shape, device="meta") for k, info in tensors.items()}


def shapes_of(tensors):
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def plain(key):
    """Returns diffusers' name of a factor without its mark for attention processors."""
    key = key.removeprefix("unet.").replace(".processor.", ".").replace("_lora.", ".lora.")
    return key.replace(".to_out.lora", ".to_out.0.lora")


@pytest.mark.parametrize("name", UNETS)
def test_names_and_shapes_are_those_of_diffusers_unet(name):
    model = on_meta(diffusers.UNet2DConditionModel, **UNETS[name])
    expected = {
        key.removesuffix(".weight"): tuple(tensor.shape)
        for key, tensor in model.state_dict().items()
        if tensor.dim() > 1 and not key.startswith(ENDS)
    }
    layers = layout(FULL[name]())[1].without_ends().layers
    layers = [layer for layer in layers if layer.part == "unet"]
    lora = {}
    for layer in layers:
        lora[layer.module + ".lora_down.weight"] = torch.zeros(layer.down_shape(1), device="meta")
        lora[layer.module + ".lora_up.weight"] = torch.zeros(layer.up_shape(1), device="meta")
    mapped = lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers(lora, model.config)
    converted, _ = lora_conversion_utils._convert_non_diffusers_lora_to_diffusers(mapped)
    factors = {plain(key): tuple(tensor.shape) for key, tensor in converted.items()}
    modules = {
        key.removesuffix(".lora.down.weight"): (
            factors[key.replace("down.w", "up.w")][0],
            *shape[1:],
        )
        for key, shape in factors.items()
        if key.endswith(".lora.down.weight")
    }
    assert modules == expected


@pytest.mark.parametrize("name", UNETS)
def test_a_full_size_unet_converts_to_diffusers(name):
    model = on_meta(diffusers.UNet2DConditionModel, **UNETS[name])
    converted = single_file_utils.convert_ldm_unet_checkpoint(written(name), {**model.config})
    assert shapes_of(converted) == shapes_of(model.state_dict())


@pytest.mark.parametrize(("name", "guidance"), [("flux_dev", True), ("flux_schnell", False)])
def test_a_full_size_flux_model_converts_to_diffusers(name, guidance):
    model = on_meta(diffusers.FluxTransformer2DModel, guidance_embeds=guidance)
    converted = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(written(name))
    assert shapes_of(converted) == shapes_of(model.state_dict())


SD3 = {
    "sd3_medium": {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536},
    "sd35_medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "sd35_large": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "qk_norm": "rms_norm",
    },
}


@pytest.mark.parametrize("name", SD3)
def test_a_full_size_sd3_model_converts_to_diffusers(name):
    settings = {"pos_embed_max_size": 192, **SD3[name]}
    model = on_meta(
        diffusers.SD3Transformer2DModel,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        attention_head_dim=64,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        **settings,
    )
    converted = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(
        {key: tensor for key, tensor in written(name).items() if key.startswith(UNET)}
    )
    expected = shapes_of(model.state_dict())
    assert shapes_of(converted) == expected


@pytest.fixture(scope="module")
def flux_lora():
    """A LoRA of rank 2 for every layer of Flux dev at full size, as kohya stores them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in layout(FULL["flux_dev"]())[1].without_ends().layers:
        tensors[layer.module + ".lora_up.weight"] = torch.randn(layer.m, 2, generator=generator)
        tensors[layer.module + ".lora_down.weight"] = torch.randn(2, layer.n, generator=generator)
        tensors[layer.module + ".alpha"] = torch.tensor(2.0)
    return tensors


def test_diffusers_maps_every_module_of_flux_loras(flux_lora):
    converted = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers(dict(flux_lora))
    model = on_meta(diffusers.FluxTransformer2DModel, guidance_embeds=True).state_dict()
    modules = {key.partition(".lora_")[0].removeprefix("transformer.") for key in converted}
    for module in modules:
        up, down = (converted[f"transformer.{module}.lora_{end}.weight"] for end in "BA")
        assert (up.shape[0], down.shape[1]) == tuple(model[f"{module}.weight"].shape)
    expected = {
        key.removesuffix(".weight")
        for key, tensor in model.items()
        if tensor.dim() == 2 and "transformer_blocks." in key
    }
    assert modules == expected


def test_diffusers_splits_a_flux_attention_as_we_see_it(flux_lora):
    converted = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers(dict(flux_lora))
    ours = "lora_unet_double_blocks_3_img_attn_qkv"
    whole = flux_lora[f"{ours}.lora_up.weight"] @ flux_lora[f"{ours}.lora_down.weight"]
    for place, letter in enumerate("qkv"):
        name = f"transformer.transformer_blocks.3.attn.to_{letter}"
        part = converted[f"{name}.lora_B.weight"] @ converted[f"{name}.lora_A.weight"]
        torch.testing.assert_close(part, whole[place * 3072 : (place + 1) * 3072])
