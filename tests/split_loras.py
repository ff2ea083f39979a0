"""LoRA files in diffusers' names for narrow transformers with fused matrices, and what they add by dense numpy.

The table is written out from ComfyUI's `flux_to_diffusers`, `mmdit_to_diffusers` and `z_image_to_diffusers`
(of Lumina 2 from diffusers' `convert_lumina2_to_diffusers`, for its keys and values have fewer rows).
"""

import numpy as np
import torch
from narrow_layouts import NARROW, UNET

from hyper_merge.checkpoints.architectures.detection import detect_family
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.checkpoints.io.header import Header, TensorInfo
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.loras.input_keys import split_keys
from hyper_merge.loras.input_lora import InputLora
from hyper_merge.loras.input_modules import LoraModules
from hyper_merge.loras.module_names import ModuleIndex

# Family: diffusers' name -> the checkpoint's, first row, end. Widths: 8 of Flux, 12 of the others.
PARTS = {
    "flux_dev": {
        "transformer_blocks.1.attn.to_q": ("double_blocks.1.img_attn.qkv", 0, 8),
        "transformer_blocks.1.attn.to_k": ("double_blocks.1.img_attn.qkv", 8, 16),
        "transformer_blocks.1.attn.to_v": ("double_blocks.1.img_attn.qkv", 16, 24),
        "transformer_blocks.1.attn.add_q_proj": ("double_blocks.1.txt_attn.qkv", 0, 8),
        "transformer_blocks.1.attn.add_k_proj": ("double_blocks.1.txt_attn.qkv", 8, 16),
        "transformer_blocks.1.attn.add_v_proj": ("double_blocks.1.txt_attn.qkv", 16, 24),
        "transformer_blocks.1.attn.to_out.0": ("double_blocks.1.img_attn.proj", 0, 8),
        "transformer_blocks.1.ff.net.0.proj": ("double_blocks.1.img_mlp.0", 0, 32),
        "transformer_blocks.1.norm1.linear": ("double_blocks.1.img_mod.lin", 0, 48),
        "single_transformer_blocks.1.attn.to_q": ("single_blocks.1.linear1", 0, 8),
        "single_transformer_blocks.1.attn.to_k": ("single_blocks.1.linear1", 8, 16),
        "single_transformer_blocks.1.attn.to_v": ("single_blocks.1.linear1", 16, 24),
        "single_transformer_blocks.1.proj_mlp": ("single_blocks.1.linear1", 24, 56),
        "single_transformer_blocks.1.proj_out": ("single_blocks.1.linear2", 0, 8),
        "single_transformer_blocks.1.norm.linear": ("single_blocks.1.modulation.lin", 0, 24),
        "x_embedder": ("img_in", 0, 8),
        "proj_out": ("final_layer.linear", 0, 4),
        "norm_out.linear": ("final_layer.adaLN_modulation.1", 0, 16),
    },
    "sd35_medium": {
        "transformer_blocks.0.attn.to_q": ("joint_blocks.0.x_block.attn.qkv", 0, 12),
        "transformer_blocks.0.attn.to_k": ("joint_blocks.0.x_block.attn.qkv", 12, 24),
        "transformer_blocks.0.attn.to_v": ("joint_blocks.0.x_block.attn.qkv", 24, 36),
        "transformer_blocks.0.attn2.to_q": ("joint_blocks.0.x_block.attn2.qkv", 0, 12),
        "transformer_blocks.0.attn2.to_k": ("joint_blocks.0.x_block.attn2.qkv", 12, 24),
        "transformer_blocks.0.attn2.to_v": ("joint_blocks.0.x_block.attn2.qkv", 24, 36),
        "transformer_blocks.0.attn2.to_out.0": ("joint_blocks.0.x_block.attn2.proj", 0, 12),
        "transformer_blocks.0.norm1.linear": ("joint_blocks.0.x_block.adaLN_modulation.1", 0, 108),
        "transformer_blocks.0.norm1_context.linear": (
            "joint_blocks.0.context_block.adaLN_modulation.1",
            *(0, 72),
        ),
        "transformer_blocks.0.ff_context.net.2": ("joint_blocks.0.context_block.mlp.fc2", 0, 12),
        "transformer_blocks.2.attn.add_q_proj": ("joint_blocks.2.context_block.attn.qkv", 0, 12),
        "transformer_blocks.2.attn.add_k_proj": ("joint_blocks.2.context_block.attn.qkv", 12, 24),
        "transformer_blocks.2.attn.add_v_proj": ("joint_blocks.2.context_block.attn.qkv", 24, 36),
        "transformer_blocks.2.norm1_context.linear": (
            "joint_blocks.2.context_block.adaLN_modulation.1",
            *(0, 24),
        ),
        "context_embedder": ("context_embedder", 0, 12),
        "time_text_embed.timestep_embedder.linear_1": ("t_embedder.mlp.0", 0, 12),
        "time_text_embed.text_embedder.linear_2": ("y_embedder.mlp.2", 0, 12),
        "norm_out.linear": ("final_layer.adaLN_modulation.1", 0, 24),
    },
    "lumina_2": {
        "layers.1.attn.to_q": ("layers.1.attention.qkv", 0, 12),
        "layers.1.attn.to_k": ("layers.1.attention.qkv", 12, 16),
        "layers.1.attn.to_v": ("layers.1.attention.qkv", 16, 20),
        "layers.1.attn.to_out.0": ("layers.1.attention.out", 0, 12),
        "layers.1.feed_forward.linear_1": ("layers.1.feed_forward.w1", 0, 48),
        "layers.1.norm1.linear": ("layers.1.adaLN_modulation.1", 0, 48),
        "context_refiner.0.attn.to_q": ("context_refiner.0.attention.qkv", 0, 12),
        "context_refiner.0.attn.to_k": ("context_refiner.0.attention.qkv", 12, 16),
        "context_refiner.0.attn.to_v": ("context_refiner.0.attention.qkv", 16, 20),
        "x_embedder": ("x_embedder", 0, 12),
        "time_caption_embed.caption_embedder.1": ("cap_embedder.1", 0, 12),
        "norm_out.linear_2": ("final_layer.linear", 0, 64),
    },
    "flux2_klein": {
        "transformer_blocks.1.attn.to_q": ("double_blocks.1.img_attn.qkv", 0, 8),
        "transformer_blocks.1.attn.to_k": ("double_blocks.1.img_attn.qkv", 8, 16),
        "transformer_blocks.1.attn.to_v": ("double_blocks.1.img_attn.qkv", 16, 24),
        "transformer_blocks.1.ff.linear_in": ("double_blocks.1.img_mlp.0", 0, 48),
        "single_transformer_blocks.1.attn.to_qkv_mlp_proj": ("single_blocks.1.linear1", 0, 72),
        "single_transformer_blocks.1.attn.to_out": ("single_blocks.1.linear2", 0, 8),
        "x_embedder": ("img_in", 0, 8),
        "context_embedder": ("txt_in", 0, 8),
        "time_guidance_embed.timestep_embedder.linear_2": ("time_in.out_layer", 0, 8),
        "norm_out.linear": ("final_layer.adaLN_modulation.1", 0, 16),
    },
}
PARTS["chroma"] = {
    name: place
    for name, place in PARTS["flux_dev"].items()
    if "attn" in name or "proj" in name.split(".", 2)[-1]
}
PARTS["chroma"] |= {
    "distilled_guidance_layer.in_proj": ("distilled_guidance_layer.in_proj", 0, 8),
    "distilled_guidance_layer.layers.3.linear_2": (
        "distilled_guidance_layer.layers.3.out_layer",
        *(0, 8),
    ),
}

# Rule `swap_scale_shift` of the same tables: scale and shift of the last norms stand the other way round.
SWAPPED = {"final_layer.adaLN_modulation.1", "joint_blocks.2.context_block.adaLN_modulation.1"}


def layout(family):
    """Returns the layout of a narrow checkpoint."""
    tensors = {key: TensorInfo(torch.float32, shape) for key, shape in NARROW[family]().items()}
    header = Header("a.safetensors", tensors, {}, 0, 0)
    return layout_of(header, detect_family(header).as_lora_input())


def index(family):
    """Returns the names of a narrow network's layers."""
    found = layout(family)
    return ModuleIndex(found.layers, found.family)


def factors(family, names, ranks=(1, 2, 3), seed=0):
    """Returns random factors of some modules by diffusers' name; their ranks take turns."""
    generator = np.random.default_rng(seed)
    shapes = NARROW[family]()
    pairs = {}
    for place, name in enumerate(names):
        stored, first, end = PARTS[family][name]
        rank, n = ranks[place % len(ranks)], shapes[f"{UNET}{stored}.weight"][1]
        pairs[name] = tuple(generator.standard_normal(s) for s in ((end - first, rank), (rank, n)))
    return pairs


def spelled(pairs, prefix="transformer.", ends=("lora_B", "lora_A"), alphas=None):
    """Returns the tensors of a file; names after a prefix with an underscore have no dots."""
    tensors = {}
    for name, (up, down) in pairs.items():
        module = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        for end, factor in zip(ends, (up, down), strict=True):
            tensors[f"{module}.{end}.weight"] = torch.tensor(factor)
        if alphas is not None:
            tensors[f"{module}.alpha"] = torch.tensor(float(alphas[name]))
    return tensors


def dense(family, matrices):
    """Returns the whole change of every stored matrix that some parts are rows of: (m, n) by stored name."""
    shapes = NARROW[family]()
    total = {}
    for name, matrix in matrices.items():
        stored, first, end = PARTS[family][name]
        whole = total.setdefault(stored, np.zeros(shapes[f"{UNET}{stored}.weight"]))
        half = len(matrix) // 2
        whole[first:end] = np.roll(matrix, half, 0) if stored in SWAPPED else matrix
    return total


def read(path, family):
    """Returns the modules of a file, and their factors by the stored names of their matrices."""
    header = read_header(path)
    modules = LoraModules(header, split_keys(header), index(family))
    with InputLora(modules) as lora:
        return modules, {
            layer.key.removeprefix(UNET).removesuffix(".weight"): lora.factors(name)
            for name, layer in lora.modules.items()
        }
