"""Anima: the transformer of Cosmos-Predict2 with an adapter for the features of a language model."""

from __future__ import annotations

from typing import Final

import torch

from hyper_merge.checkpoints.architectures.families.shared import NATIVE, VAE, transformer_part
from hyper_merge.checkpoints.architectures.lora_modules import Module, modules_matching, no_modules
from hyper_merge.checkpoints.architectures.signatures import UNET
from hyper_merge.checkpoints.architectures.spec import PEFT, DetectionRule, Family, NetworkPart
from hyper_merge.checkpoints.io.header import Shape

_BLOCK: Final = UNET + "blocks.0.mlp.layer1."
_MODULATION: Final = UNET + "blocks.0.adaln_modulation_cross_attn."
_ADAPTER: Final = UNET + "llm_adapter."
_MODULES: Final = (
    r"blocks\.\d+\.((self|cross)_attn\.(q|k|v|output)_proj|mlp\.layer[12]"
    r"|adaln_modulation_(self_attn|cross_attn|mlp)\.[12])"
)


_ENDS: Final = (
    r"x_embedder\.proj\.1|t_embedder\.1\.linear_[12]|final_layer\.(linear|adaln_modulation\.[12])"
)


def _ends(path: str, shape: Shape) -> tuple[Module, ...]:
    return modules_matching(path, shape, _ENDS)


def _modules(path: str, shape: Shape) -> tuple[Module, ...]:
    return modules_matching(path, shape, _MODULES)


ANIMA: Final = Family(
    name="anima",
    title="Anima",
    rule=DetectionRule((_BLOCK, _MODULATION, _ADAPTER + "blocks.0.cross_attn.")),
    parts=(
        # Forge Neo counts it to the text encoder and applies that one's multiplier to it.
        NetworkPart("text_encoder", "adapter", _ADAPTER, NATIVE + "llm_adapter.", no_modules),
        transformer_part(_modules, NATIVE, foreign_modules=_ends),
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
