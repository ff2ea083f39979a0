"""Files that people choose by mistake, recognised by their keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from hyper_merge.checkpoints.architectures.signatures import LABELS, TEXTS, UNET, KeySignature

_VAE: Final = "first_stage_model."
# LyCORIS' kinds under names that no other part of the key tells: LoHa, LoKr, OFT, DoRA, GLoRA, IA3, norms.
_ADAPTERS: Final = (
    *(".hada_", ".lokr_", ".oft_", ".dora_scale"),
    *(".a1.weight", ".b1.weight", ".on_input", ".w_norm"),
)
_TEXTS_ALONE: Final = (
    *("text_model.", "transformer.resblocks.", "encoder.block."),
    *("token_embd.", "enc.blk."),  # in GGUF files
)
_CONTROL: Final = ("zero_convs.", "input_hint_block.")


@dataclass(frozen=True)
class UnsupportedModel:
    """A kind of file that is not a checkpoint, or not one that can be averaged."""

    title: str  # after "is"
    matches: Callable[[KeySignature], bool]


# Checked before the families: these may contain a whole checkpoint's keys.
DISGUISED: Final[tuple[UnsupportedModel, ...]] = (
    UnsupportedModel(
        "a 4-bit model (nf4 or fp4, bitsandbytes): use its fp16 version",
        lambda s: s.mentions(".absmax", "quant_state", ".quant_map"),
    ),
    UnsupportedModel(
        "an 8-bit model of whole numbers (bitsandbytes): use its fp16 version",
        lambda s: s.mentions(".SCB"),
    ),
    UnsupportedModel(
        "a quantised model (GPTQ, AWQ, SVDQuant): use its fp16 version",
        lambda s: s.mentions(".qweight", ".qzeros", ".wscales", ".smooth_factor"),
    ),
    UnsupportedModel(
        "a quantised model with scales by block (nvfp4, mxfp8): use its fp16 version",
        lambda s: s.mentions(".scale_weight", ".weight_scale"),
    ),
    UnsupportedModel(
        "a LoRA",
        lambda s: (
            (
                s.any_match(r"^(lora|lycoris)_|[._]lora[._](up|down|A|B|mid)\b")
                if s.mentions("lora_", "lora.", "lycoris_")
                else s.mentions(*_ADAPTERS) or s.any_match(r"\.diff(_b)?$")
            )
            or s.mentions("lora_linear_layer.", "lora_embedding_")
        ),
    ),
    UnsupportedModel(
        "a textual-inversion embedding",
        lambda s: s.has("string_to_param", "emb_params", "<") or _only(s, "clip_l", "clip_g"),
    ),
    UnsupportedModel(
        "a ControlNet",
        lambda s: (
            s.has("control_model.", "controlnet_", *_CONTROL)
            or s.mentions(*("." + part for part in _CONTROL))
        ),
    ),
)

# Checked after the families: parts of a checkpoint, and other networks.
PARTIAL: Final[tuple[UnsupportedModel, ...]] = (
    UnsupportedModel("an IP-Adapter", lambda s: s.has("image_proj.", "ip_adapter.")),
    UnsupportedModel(
        "an AnimateDiff motion module", lambda s: s.any_match(r"(^|\.)motion_modules\.")
    ),
    UnsupportedModel(
        "a Stable Diffusion XL checkpoint without its second text encoder",
        lambda s: s.has(LABELS) and s.has_text_encoder,
    ),
    UnsupportedModel("a video model", lambda s: s.any_match(r"\.time_stack\.|\.time_mixer\.")),
    UnsupportedModel(
        "a checkpoint with nothing but training averages (model_ema): use its other version",
        lambda s: s.has("model_ema.") and not s.has(UNET),
    ),
    UnsupportedModel(
        "a transformer in diffusers' layout that is not whole or not of a kind that is read so, such as"
        " one of several files, or a quantised one: use its single-file version, or open it in ComfyUI"
        " (Load Diffusion Model) and save it there (ModelSave)",
        # Under the usual prefix too: that of a bare network is put before all its keys.
        lambda s: s.any_match(
            r"^(model\.diffusion_model\.)?("
            r"((single|joint)_)?transformer_blocks\.\d+\."
            r"|(layers|noise_refiner|context_refiner)\.\d+\.att(n|ention)\.(to_q|norm_q)\."
            r"|blocks\.\d+\.attn1\.to_q\.)"
        ),
    ),
    UnsupportedModel(
        "a UNet alone of a kind that cannot be recognised",
        lambda s: s.has(UNET) and not s.has_text_encoder,
    ),
    UnsupportedModel(
        "a part of a diffusers model: save it as one .safetensors checkpoint first",
        lambda s: s.any_match(r"^(down|up|mid)_blocks?\.|^(en|de)coder\.(down|up|mid)_blocks?\."),
    ),
    UnsupportedModel(
        "a VAE alone",
        lambda s: (
            not s.has(UNET, *TEXTS)
            and s.has(
                *(p + c for p in ("", _VAE) for c in ("decoder.conv_in.", "encoder.conv_in."))
            )
        ),
    ),
    UnsupportedModel("a CLIP vision model", lambda s: s.has("vision_model.", "visual.")),
    UnsupportedModel(
        "a text encoder alone",
        lambda s: not s.has(UNET) and s.has(*TEXTS, *_TEXTS_ALONE),
    ),
    UnsupportedModel(
        "an upscaler",
        lambda s: s.any_match(
            r"^(params(_ema)?\.)?(model\.1\.sub\.|RRDB_trunk|conv_first\.|body\.0\.|layers\.0\.residual)"
        ),
    ),
)


def _only(signature: KeySignature, *keys: str) -> bool:
    return bool(signature.shapes) and set(signature.shapes) <= set(keys)
