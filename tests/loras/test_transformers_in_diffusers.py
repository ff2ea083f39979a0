"""diffusers' own loaders take every module of the newer transformers' LoRAs, by name and shape."""

import warnings

import pytest
import torch
from narrow_layouts import FULL

from hyper_merge.checkpoints.architectures.detection import detect_family
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.checkpoints.io.header import Header, TensorInfo
from hyper_merge.loras.lora_file import lora_tensors
from hyper_merge.operations.loras.known_layers import known_family

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries, on being imported
    diffusers = pytest.importorskip("diffusers")
    loaders = pytest.importorskip("diffusers.loaders.lora_pipeline")

# Family: loader, model, its settings, and how many of its modules the LoRA changes, where diffusers
# splits what checkpoints store as one.
CASES = {
    "z_image": ("ZImage", "ZImageTransformer2DModel", {}, 270),
    "lumina_2": ("Lumina2", "Lumina2Transformer2DModel", {"cap_feat_dim": 2304}, 238),
    "anima": ("Anima", "CosmosTransformer3DModel", {"num_attention_heads": 16}, 448),
    "qwen_image": ("QwenImage", "QwenImageTransformer2DModel", {}, 840),
    "chroma": ("Flux", "ChromaTransformer2DModel", {}, 418),
    "flux2_klein": (
        "Flux2",
        "Flux2Transformer2DModel",
        {
            "num_attention_heads": 32,
            "num_single_layers": 24,
            "joint_attention_dim": 12288,
            "guidance_embeds": False,
        },
        8 * 12 + 24 * 2 + 3,
    ),
    "wan": ("Wan", "WanTransformer3DModel", {}, 400),
    "wan_i2v": (
        "Wan",
        "WanTransformer3DModel",
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        480,
    ),
}


def lora_of(name, rank=1):
    """Returns a whole LoRA's tensors at full size, without memory."""
    tensors = {key: TensorInfo(torch.bfloat16, shape) for key, shape in FULL[name]().items()}
    header = Header("x.safetensors", tensors, {}, 0, 0)
    layout = layout_of(header, detect_family(header))
    alpha = rank if layout.family.lora_alpha else None
    ranks = [rank] * len(layout.layers)
    table = lora_tensors(layout.layers, ranks, torch.bfloat16, alpha)
    return {
        key: torch.tensor(float(rank)) if key.endswith(".alpha") else torch.zeros(info.shape)
        for key, info in table.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_diffusers_takes_every_module(name):
    kind, model_name, settings, count = CASES[name]
    loader = getattr(loaders, f"{kind}LoraLoaderMixin", None)
    if loader is None or not hasattr(diffusers, model_name):
        pytest.skip(f"this version of diffusers does not know {kind}")
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore", FutureWarning)  # of one part of the library for another
        model = getattr(diffusers, model_name)(**settings).state_dict()
    converted = loader.lora_state_dict(lora_of(name))
    converted = converted[0] if isinstance(converted, tuple) else converted
    modules = {key.partition(".lora_")[0].removeprefix("transformer.") for key in converted}
    assert len(modules) == count
    for module in modules:
        up, down = (converted[f"transformer.{module}.lora_{end}.weight"] for end in "BA")
        assert (up.shape[0], down.shape[1]) == tuple(model[f"{module}.weight"].shape), module


def test_diffusers_has_every_matrix_of_anima_under_the_name_that_is_read():
    loader = getattr(loaders, "AnimaLoraLoaderMixin", None)
    if loader is None:
        pytest.skip("this version of diffusers does not know Anima")
    known = known_family("anima")
    assert sum("llm_adapter" in layer.module for layer in known.layers) == 61
    names = [f"{layer.module}.lora_A.weight" for layer in known.layers]
    converted = loader.lora_state_dict({name: torch.zeros(1) for name in names})
    for layer, name in zip(known.layers, converted, strict=True):
        (place,) = known.index.find(name.removesuffix(".lora_A.weight"))
        assert (place.layer, place.converted) == (layer, True), name
