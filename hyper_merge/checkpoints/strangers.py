"""Files that people choose by mistake: what they are, told from their keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from hyper_merge.checkpoints.structure import UNET, Structure

_TEXT: Final = ("cond_stage_model.", "conditioner.embedders.")
_VAE: Final = "first_stage_model."


@dataclass(frozen=True)
class Stranger:
    """A kind of file that is not a checkpoint, or not one that can be averaged."""

    title: str  # after "is"
    matches: Callable[[Structure], bool]


# Told before the families: these may contain a whole checkpoint's keys.
DISGUISED: Final[tuple[Stranger, ...]] = (
    Stranger(
        "a quantised (nf4, bitsandbytes) model: use its fp16 version",
        lambda s: s.any_match(r"\.absmax$|quant_state|\.quant_map$|\.SCB$|\.qweight$"),
    ),
    Stranger(
        "an fp8 model with separate scales: use its fp16 version",
        lambda s: s.any_match(r"^scaled_fp8$|\.scale_weight$|\.weight_scale$"),
    ),
    Stranger(
        "a LoRA",
        lambda s: s.any_match(
            r"[._]lora[._](up|down|A|B|mid)\b|\.hada_|\.lokr_|\.oft_|\.dora_scale$|^lora_(unet|te)"
        ),
    ),
    Stranger(
        "a textual-inversion embedding",
        lambda s: s.any_match(r"^(string_to_param|emb_params$|<)") or _only(s, "clip_l", "clip_g"),
    ),
    Stranger(
        "a ControlNet",
        lambda s: s.any_match(
            r"^(control_model\.|controlnet_)|(^|\.)(zero_convs|input_hint_block)\."
        ),
    ),
)

# Told after the families: parts of a checkpoint, and other networks.
PARTIAL: Final[tuple[Stranger, ...]] = (
    Stranger("an IP-Adapter", lambda s: s.has("image_proj.", "ip_adapter.")),
    Stranger("an AnimateDiff motion module", lambda s: s.any_match(r"(^|\.)motion_modules\.")),
    Stranger(
        "a Stable Diffusion XL checkpoint without its second text encoder",
        lambda s: s.label_embedding and s.has(*_TEXT),
    ),
    Stranger(
        "a UNet alone, without text encoder",
        lambda s: s.has(UNET, "input_blocks.") and not s.has(*_TEXT),
    ),
    Stranger(
        "a part of a diffusers model: save it as one .safetensors checkpoint first",
        lambda s: s.any_match(r"^(down|up|mid)_blocks?\.|^(en|de)coder\.(down|up|mid)_blocks?\."),
    ),
    Stranger(
        "a VAE alone",
        lambda s: (
            not s.has(UNET, *_TEXT)
            and s.has(
                *(p + c for p in ("", _VAE) for c in ("decoder.conv_in.", "encoder.conv_in."))
            )
        ),
    ),
    Stranger("a CLIP vision model", lambda s: s.has("vision_model.", "visual.")),
    Stranger(
        "a text encoder alone",
        lambda s: (
            not s.has(UNET)
            and s.has(
                *_TEXT, "text_model.", "transformer.resblocks.", "encoder.block.", "text_encoders."
            )
        ),
    ),
    Stranger(
        "an upscaler",
        lambda s: s.any_match(
            r"^(params(_ema)?\.)?(model\.1\.sub\.|RRDB_trunk|conv_first\.|body\.0\.|layers\.0\.residual)"
        ),
    ),
)


def _only(structure: Structure, *keys: str) -> bool:
    return bool(structure.shapes) and set(structure.shapes) <= set(keys)
