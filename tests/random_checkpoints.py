"""Small checkpoints of random numbers for every family, and merges of them."""

import math

import torch
from narrow_layouts import UNET, one
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_family import layers_of, merge

CLIP = "cond_stage_model.transformer.text_model."
SPREAD = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
NARROW_SPREAD = 0.05  # of a checkpoint that predicts noise
WIDE = 64  # a rank that no layer of these files reaches


def state(shapes, seed, step=0.1, dtype=torch.float32):
    """Returns random numbers; those of each seed are a step away from one base."""
    common, individual = (torch.Generator().manual_seed(n) for n in (0, seed + 1))
    tensors = {}
    for key, shape in shapes.items():
        values = torch.randn(shape, generator=common) + step * torch.randn(
            shape, generator=individual
        )
        values *= NARROW_SPREAD if key == SPREAD else 1.0
        tensors[key] = torch.arange(77)[None] if key.endswith("_ids") else values.to(dtype)
    return tensors


def sane_weights(shapes):
    """Returns weights by which activations neither vanish nor explode."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes.items():
        if key.endswith("position_ids"):
            continue
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            state[key] = values / math.sqrt(math.prod(shape[1:]))
        else:
            state[key] = 0.2 * values + (0.0 if key.endswith("bias") else 1.0)
    return state


def networks(folder, count):
    """Writes whole narrow files of SD 1.x around a network whose activations are sound."""
    base, states = sane_weights(one(width=32)), []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed + 1)
        steps = {key: torch.randn(x.shape, generator=generator) for key, x in base.items()}
        states.append({key: x + 0.1 * x.std() * steps[key] for key, x in base.items()})
    return files(folder, *states)


def files(folder, *states, names="abcdef"):
    folder.mkdir(exist_ok=True, parents=True)
    paths = [folder / f"{name}.safetensors" for name, _ in zip(names, states, strict=False)]
    for path, tensors in zip(paths, states, strict=True):
        save_file(tensors, path)
    return paths


def merged_exactly(models, folder, **settings):
    """A merge of two whose one LoRA is wide enough to hold all of their difference.

    Two checkpoints differ in one direction, so there is nothing that a joint search could find.
    """
    even = {"ranks": (WIDE,), "allocation": "even", "method": "greedy"}
    settings = {**even, "dtype": "float32", **settings}
    return merge(models, folder / "models", **{"allocation": "even", **settings})


def added(lora, module):
    """Returns what a host adds at multiplier 1; without an alpha, the plain product."""
    ends = ("up", "down") if f"{module}.lora_up.weight" in lora else ("B", "A")
    up, down = (lora[f"{module}.lora_{end}.weight"].double().flatten(1) for end in ends)
    alpha = lora.get(f"{module}.alpha")
    return up @ down * (1.0 if alpha is None else alpha.double() / len(down))


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def misses(merged, path, row):
    """Returns by layer the relative error of one row's LoRAs on a checkpoint's deviation."""
    average, checkpoint = load_file(merged.place.hyper_model), load_file(path)
    loras = [load_file(lora) for lora in merged.loras]
    for layer in layers_of(merged.place.hyper_model):
        rows = slice(*layer.rows) if layer.rows else slice(None)
        base, exact = (
            state[layer.key][rows].double().flatten(1) for state in (average, checkpoint)
        )
        terms = zip(row.multipliers_of(layer.part), loras, strict=True)
        delta = sum(x * added(lora, layer.module) for x, lora in terms)
        yield float((base + delta - exact).norm() / (exact - base).norm())
