"""LoRA files of every spelling for few layers of SD 1.x at full size, and what they add by dense numpy."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from hyper_merge.decomposition.initialization import SearchEffort
from hyper_merge.loras.prompt_tags import parse_tags
from hyper_merge.operations.loras.known_layers import known_family
from hyper_merge.operations.loras.share import preflight_share, run_share
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.progress import Progress

QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
OUT = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
PROJECTION = "lora_unet_down_blocks_0_attentions_0_proj_in"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
SHAPES = {
    QUERY: (320, 320),
    KEY: (320, 768),
    OUT: (320, 320),
    PROJECTION: (320, 320, 1, 1),
    CONV: (320, 320, 3, 3),
    TEXT: (3072, 768),
}
METADATA = {"ss_base_model_version": "sd_v1"}

# The dotted names of the same modules, in diffusers and in ComfyUI.
DIFFUSERS = {
    QUERY: "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    KEY: "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    OUT: "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
    PROJECTION: "unet.down_blocks.0.attentions.0.proj_in",
    CONV: "unet.down_blocks.0.resnets.0.conv1",
    TEXT: "text_encoder.text_model.encoder.layers.0.mlp.fc1",
}
COMFY = {
    QUERY: "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    KEY: "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k",
    OUT: "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
    PROJECTION: "diffusion_model.input_blocks.1.1.proj_in",
    CONV: "diffusion_model.input_blocks.1.0.in_layers.2",
    TEXT: "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
}


def factors(rank=4, seed=0, modules=SHAPES, size=0.02):
    """Returns random factors (m, r), (r, n) by module, as numpy arrays of float32."""
    generator = np.random.default_rng(seed)
    pairs = {}
    for module in modules:
        m, n = SHAPES[module][0], int(np.prod(SHAPES[module][1:]))
        fall = np.arange(1, rank + 1) ** -0.7
        up = generator.standard_normal((m, rank)) * fall * size
        pairs[module] = (up.astype("f4"), generator.standard_normal((rank, n)).astype("f4") * size)
    return pairs


def kohya(pairs, alpha=None, dtype=torch.float32):
    """Returns the tensors of a file as kohya's scripts write it."""
    state = {}
    for module, (up, down) in pairs.items():
        shape, rank = SHAPES[module], up.shape[1]
        ones = (1,) * (len(shape) - 2)
        state[f"{module}.lora_up.weight"] = torch.tensor(up).reshape(-1, rank, *ones).to(dtype)
        state[f"{module}.lora_down.weight"] = torch.tensor(down).reshape(rank, *shape[1:]).to(dtype)
        if alpha is not None:
            state[f"{module}.alpha"] = torch.tensor(float(alpha))
    return state


def spelled(pairs, names, up, down, alpha=None):
    """Returns the tensors under other names, with other ends for both factors."""
    ends = {"lora_up.weight": up, "lora_down.weight": down}
    state = {}
    for key, tensor in kohya(pairs, alpha).items():
        module, _, end = key.partition(".")
        state[f"{names[module]}.{ends.get(end, end)}"] = tensor
    return state


def write(path, state, metadata=METADATA):
    """Writes a file."""
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, dict(metadata))
    return path


def write_lora(path, seed=0, rank=4, alpha=None, modules=SHAPES, dtype=torch.float16):
    """Writes a random LoRA in kohya's spelling."""
    return write(path, kohya(factors(rank, seed, modules), alpha, dtype))


def dense(path: Path):
    """Returns what a file in kohya's spelling adds, by module: numpy, float64."""
    state = {key: tensor.to(torch.float64).numpy() for key, tensor in load_file(path).items()}
    changes = {}
    for key, up in state.items():
        if not key.endswith(".lora_up.weight"):
            continue
        module = key.removesuffix(".lora_up.weight")
        down = state[f"{module}.lora_down.weight"]
        rank = len(down)
        alpha = float(state.get(f"{module}.alpha", rank))
        changes[module] = up.reshape(len(up), -1) @ down.reshape(rank, -1) * (alpha / rank)
    return changes


def energy(changes):
    """Returns the squared norm of all changes."""
    return sum(float((change**2).sum()) for change in changes.values())


def distance(one, other):
    """Returns the squared norm of the difference, a missing module counting as zeros."""
    names = {*one, *other}
    return energy({name: one.get(name, 0.0) - other.get(name, 0.0) for name in names})


def write_few(path, family, pattern, metadata=()):
    """Writes a LoRA of rank 1 for the modules of a family that hold a text."""
    state = {}
    for layer in known_family(family).layers:
        if pattern in layer.module:
            state[f"{layer.module}.lora_up.weight"] = torch.ones(layer.up_shape(1))
            state[f"{layer.module}.lora_down.weight"] = torch.ones(layer.down_shape(1))
    return write(path, state, dict(metadata))


def share(paths, output, **settings):
    """Shares LoRAs in a small way, with a short search for a start."""
    small = {"name": "mix", "ranks": (6, 3), "iterations": 4, "device": "cpu", "exact": "none"}
    values = {**small, "layer_weights": "plain", **settings}
    if "budget" in settings or "target" in settings:
        del values["ranks"]
    recipe = Recipe.from_settings({**values, "models": tuple(paths), "output": output}, "recipe")
    return run_share(preflight_share(recipe), Progress(), SearchEffort.QUICK)


def restored(result, row):
    """Returns what the prompt of an input adds, from the files alone."""
    total = {}
    for tag in parse_tags(result.report.tags(row)):
        (path,) = [path for path in result.loras if path.stem == tag.name]
        for module, change in dense(path).items():
            x = tag.text_multiplier if module.startswith("lora_te") else tag.multiplier
            total[module] = total.get(module, 0.0) + x * change
    return total


def write_related(folder, count=4, rank=4, latents=2):
    """Writes LoRAs that are mixtures of few, each with a little of its own."""
    generator = np.random.default_rng(7)
    shared = [factors(rank, 100 + place) for place in range(latents)]
    paths = []
    for c in range(count):
        mix = generator.standard_normal(latents)
        own = factors(2, c, size=0.008)
        pairs = {}
        for module in SHAPES:
            ups = [
                own[module][0],
                *(x * part[module][0] for x, part in zip(mix, shared, strict=True)),
            ]
            downs = [own[module][1], *(part[module][1] for part in shared)]
            pairs[module] = (np.concatenate(ups, 1), np.concatenate(downs))
        paths.append(write(folder / f"lora{c}.safetensors", kohya(pairs, 5, torch.float16)))
    return paths
