"""Configurations by which hosts know that a checkpoint predicts v, in the form that they read.

The hyper-parameters are those of the released models; the names of classes are the hosts' own.
"""

from __future__ import annotations

from typing import Any, Final

_LDM: Final = "ldm.modules"
_SGM: Final = "sgm.modules"
_DENOISER: Final = f"{_SGM}.diffusionmodules.denoiser"


def sd2_v() -> dict[str, Any]:
    """Returns the configuration of Stable Diffusion 2.x for 768 pixels."""
    unet = {
        "use_checkpoint": True,
        "use_fp16": True,
        "image_size": 32,
        "attention_resolutions": [4, 2, 1],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": 1,
        "context_dim": 1024,
    }
    text = {"freeze": True, "layer": "penultimate"}
    params = {
        "parameterization": "v",
        "linear_start": 0.00085,
        "linear_end": 0.0120,
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "timesteps": 1000,
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": 64,
        "channels": 4,
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn",
        "monitor": "val/loss_simple_ema",
        "scale_factor": 0.18215,
        "use_ema": False,
        "unet_config": _component(f"{_LDM}.diffusionmodules.openaimodel.UNetModel", _unet() | unet),
        "first_stage_config": _component("ldm.models.autoencoder.AutoencoderKL", _vae({})),
        "cond_stage_config": _component(f"{_LDM}.encoders.modules.FrozenOpenCLIPEmbedder", text),
    }
    return {"model": _component("ldm.models.diffusion.ddpm.LatentDiffusion", params)}


def sdxl_v() -> dict[str, Any]:
    """Returns the configuration of Stable Diffusion XL."""
    unet = {
        "adm_in_channels": 2816,
        "num_classes": "sequential",
        "use_checkpoint": False,
        "attention_resolutions": [4, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [1, 2, 10],
        "context_dim": 2048,
        "spatial_transformer_attn_type": "softmax-xformers",
    }
    vae = "sgm.models.autoencoder.AutoencoderKLInferenceWrapper"
    params = {
        "scale_factor": 0.13025,
        "disable_first_stage_autocast": True,
        "denoiser_config": _component(f"{_DENOISER}.DiscreteDenoiser", _v_denoiser()),
        "network_config": _component(
            f"{_SGM}.diffusionmodules.openaimodel.UNetModel", _unet() | unet
        ),
        "conditioner_config": _component(
            f"{_SGM}.GeneralConditioner", {"emb_models": _sdxl_texts()}
        ),
        "first_stage_config": _component(vae, _vae({"attn_type": "vanilla-xformers"})),
    }
    return {"model": _component("sgm.models.diffusion.DiffusionEngine", params)}


def _component(target: str, params: dict[str, Any]) -> dict[str, Any]:
    return {"target": target, "params": params}


def _unet() -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "num_res_blocks": 2,
        "num_head_channels": 64,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "legacy": False,
    }


def _vae(attention: dict[str, Any]) -> dict[str, Any]:
    network = {
        **attention,
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    loss = {"target": "torch.nn.Identity"}
    return {"embed_dim": 4, "monitor": "val/rec_loss", "ddconfig": network, "lossconfig": loss}


def _v_denoiser() -> dict[str, Any]:
    return {
        "num_idx": 1000,
        "weighting_config": {"target": f"{_DENOISER}_weighting.EpsWeighting"},
        "scaling_config": {"target": f"{_DENOISER}_scaling.VScaling"},
        "discretization_config": {
            "target": f"{_SGM}.diffusionmodules.discretizer.LegacyDDPMDiscretization"
        },
    }


def _sdxl_texts() -> list[dict[str, Any]]:
    module = f"{_SGM}.encoders.modules"
    first = {"layer": "hidden", "layer_idx": 11}
    second = {
        "arch": "ViT-bigG-14",
        "version": "laion2b_s39b_b160k",
        "freeze": True,
        "layer": "penultimate",
        "always_return_pooled": True,
        "legacy": False,
    }
    texts = (("FrozenCLIPEmbedder", first), ("FrozenOpenCLIPEmbedder2", second))
    sizes = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
    return [
        *(
            {"is_trainable": False, "input_key": "txt", **_component(f"{module}.{n}", p)}
            for n, p in texts
        ),
        *(
            {
                "is_trainable": False,
                "input_key": key,
                **_component(f"{module}.ConcatTimestepEmbedderND", {"outdim": 256}),
            }
            for key in sizes
        ),
    ]
