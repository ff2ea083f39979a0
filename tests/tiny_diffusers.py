"""A configuration for diffusers, tokenizer and all, that fits narrow checkpoints; nothing is fetched."""

import json
from pathlib import Path

LETTERS = "abcdefghijklmnopqrstuvwxyz,"


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Writes CLIP's tokenizer for one letter at a time: no word of it is merged."""
    folder.mkdir(parents=True)
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    assert len(tokens) <= vocabulary - 2
    tokens += [f"unused{number}" for number in range(vocabulary - 2 - len(tokens))]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_sd1_configuration(folder: Path, spec) -> Path:
    """Writes what `from_single_file` fetches for a family of these widths."""
    components = {
        "scheduler": ("diffusers", "PNDMScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "safety_checker": (None, None),
        "feature_extractor": (None, None),
    }
    _write(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline", **components})
    _write(
        folder / "scheduler/scheduler_config.json",
        {
            "_class_name": "PNDMScheduler",
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "num_train_timesteps": 1000,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
        },
    )
    _write(
        folder / "text_encoder/config.json",
        {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "vocab_size": spec.vocabulary,
            "hidden_size": spec.context,
            "intermediate_size": 4 * spec.context,
            "projection_dim": spec.context,
            "num_hidden_layers": 12,
            "num_attention_heads": 4,
            "max_position_embeddings": 77,
            "hidden_act": "quick_gelu",
            "bos_token_id": spec.vocabulary - 2,
            "eos_token_id": spec.vocabulary - 1,
        },
    )
    _write(
        folder / "unet/config.json",
        {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 8,
            "block_out_channels": [factor * spec.width for factor in (1, 2, 4, 4)],
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "norm_num_groups": 16,
            "cross_attention_dim": spec.context,
        },
    )
    _write(
        folder / "vae/config.json",
        {
            "_class_name": "AutoencoderKL",
            "sample_size": 64,
            "block_out_channels": [factor * spec.vae_width for factor in (1, 2, 4, 4)],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "layers_per_block": 2,
            "latent_channels": 4,
            "norm_num_groups": 4,
        },
    )
    write_tokenizer(folder / "tokenizer", spec.vocabulary)
    return folder


def _write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
