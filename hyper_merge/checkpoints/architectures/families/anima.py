"""Anima: the transformer of Cosmos-Predict2 with an adapter for the features of a language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from hyper_merge.checkpoints.architectures.families.shared import NATIVE, VAE, transformer_part
from hyper_merge.checkpoints.architectures.lora_modules import Module, modules_matching, no_modules
from hyper_merge.checkpoints.architectures.signatures import UNET
from hyper_merge.checkpoints.architectures.spec import PEFT, DetectionRule, Family, NetworkPart
from hyper_merge.checkpoints.architectures.split_modules import SplitModule, split_modules
from hyper_merge.checkpoints.io.header import Shape

_BLOCK: Final = UNET + "blocks.0.mlp.layer1."
_MODULATION: Final = UNET + "blocks.0.adaln_modulation_cross_attn."
_ADAPTER_PATH: Final = "llm_adapter."
_ADAPTER: Final = UNET + _ADAPTER_PATH
_MODULES: Final = (
    r"blocks\.\d+\.((self|cross)_attn\.(q|k|v|output)_proj|mlp\.layer[12]"
    r"|adaln_modulation_(self_attn|cross_attn|mlp)\.[12])"
)
# kohya's scripts train the adapter on request (`train_llm_adapter`), ComfyUI knows it by its own names.
_FOREIGN: Final = (
    r"x_embedder\.proj\.1|t_embedder\.1\.linear_[12]|final_layer\.(linear|adaln_modulation\.[12])"
    r"|llm_adapter\.(blocks\.\d+\.((self|cross)_attn\.[qkvo]_proj|mlp\.[02])|out_proj)"
)
_ATTENTION: Final = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "output_proj": "to_out.0",
}
_DIFFUSERS: Final[Mapping[str, tuple[str, ...]]] = {
    **{
        f"blocks.#.{stored}_attn.{part}": (f"transformer_blocks.#.{name}.{module}",)
        for stored, name in (("self", "attn1"), ("cross", "attn2"))
        for part, module in _ATTENTION.items()
    },
    **{
        f"blocks.#.adaln_modulation_{stored}.{i}": (f"transformer_blocks.#.{name}.linear_{i}",)
        for stored, name in (("self_attn", "norm1"), ("cross_attn", "norm2"), ("mlp", "norm3"))
        for i in (1, 2)
    },
    "blocks.#.mlp.layer1": ("transformer_blocks.#.ff.net.0.proj",),
    "blocks.#.mlp.layer2": ("transformer_blocks.#.ff.net.2",),
    "x_embedder.proj.1": ("patch_embed.proj",),
    "t_embedder.#.linear_1": ("time_embed.t_embedder.linear_1",),
    "t_embedder.#.linear_2": ("time_embed.t_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaln_modulation.1": ("norm_out.linear_1",),
    "final_layer.adaln_modulation.2": ("norm_out.linear_2",),
}


def _foreign_modules(path: str, shape: Shape) -> tuple[Module, ...]:
    return modules_matching(path, shape, _FOREIGN)


def _split_modules(path: str, shape: Shape) -> tuple[SplitModule, ...]:
    """Returns diffusers' name of a matrix: none is split, and the adapter is a model of its own there."""
    if path.startswith(_ADAPTER_PATH):
        name = f"text_conditioner.{path.removeprefix(_ADAPTER_PATH)}"
        return (SplitModule(name, (0, shape[0])),)
    return split_modules(path, shape, _DIFFUSERS)


def _modules(path: str, shape: Shape) -> tuple[Module, ...]:
    return modules_matching(path, shape, _MODULES)


ANIMA: Final = Family(
    name="anima",
    title="Anima",
    rule=DetectionRule((_BLOCK, _MODULATION, _ADAPTER + "blocks.0.cross_attn.")),
    parts=(
        transformer_part(_modules, NATIVE, _split_modules, _foreign_modules),
        # No LoRA of a merge has it: Forge Neo counts it to the text encoder, with that one's multiplier.
        # Those of other programs' LoRAs are layers of the transformer, with one multiplier for both.
        NetworkPart("text_encoder", "adapter", _ADAPTER, NATIVE + _ADAPTER_PATH, no_modules),
    ),
    vae_prefixes=VAE,
    lora_alpha=False,  # diffusers refuses a file with any
    lora_spelling=PEFT,
    in_a1111=False,
    half=torch.bfloat16,
    ss_base_model_version="anima",
    modelspec_architecture="anima",
    modelspec_implementation="https://github.com/nvidia-cosmos/cosmos-predict2",
    modelspec_resolution="1024x1024",
    sd_version="Unknown",
)

FAMILIES: Final = (
    ANIMA,
    Family("cosmos_predict2", "Cosmos-Predict2", DetectionRule((_BLOCK, _MODULATION))),
)
