"""Tiny checkpoints of the real structure, and what tests do with files."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyper_merge.checkpoints.architectures.detection import require_supported
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.loras.prompt_tags import Tag
from hyper_merge.operations.merge.merge import MergeResult, run_merge
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.progress import Progress
from hyper_merge.synthetic.writer import NARROW

TINY = replace(
    NARROW, count=3, width=16, context=24, vocabulary=20, vae_width=4, terms=12, vae_differs=True
)
UNET = "model.diffusion_model."
TEXT = "cond_stage_model.transformer.text_model."
POSITION_IDS = TEXT + "embeddings.position_ids"
QUERY = UNET + "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
NORM = UNET + "middle_block.1.norm.weight"
VAE = "first_stage_model.quant_conv.weight"
RANKS = (4, 2)

# A few blocks of each kind: by these a file is told to be SD 1.x, and they have all kinds of layers.
KEPT = re.compile(
    r"model\.diffusion_model\.(time_embed|input_blocks\.[013]|middle_block\.1|output_blocks\.2\.0|out)\..*"
    r"|.*\.input_blocks\.([47]\.1\.transformer_blocks\.0\.norm1\.bias|[69]\.0\.op\.bias)"
    r"|.*text_model\.(embeddings|encoder\.layers\.[01]|final_layer_norm)\..*"
    r"|first_stage_model\.(quant_conv|post_quant_conv|encoder\.conv_in|decoder\.norm_out)\..*"
)

Exact = Mapping[str, Tensor]  # key -> (k, *shape), float32, or int64 for position ids
State = dict[str, Tensor]


def write(path: Path, state: State) -> Path:
    """A checkpoint file of the kind that its suffix says."""
    if path.suffix == ".ckpt":
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        save_file(state, path)
    return path


def load(path: Path) -> State:
    """All tensors of a checkpoint file."""
    if path.suffix == ".ckpt":
        return torch.load(path, weights_only=True)["state_dict"]
    return load_file(path)


def recipe(models, output: Path, **settings: Any) -> Recipe:
    """A small merge's recipe."""
    values = {"name": "mix", "ranks": RANKS, "iterations": 3, "device": "cpu", **settings}
    return Recipe.from_settings({**values, "models": tuple(models), "output": output}, "recipe")


def merge(models, output: Path, progress: Progress | None = None, **settings: Any) -> MergeResult:
    """A small merge."""
    return run_merge(run_preflight(recipe(models, output, **settings)), progress or Progress())


def snapshot(folder: Path) -> dict[str, bytes]:
    """Content by relative path of every file, hidden ones included, but for the cache."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "cache" not in path.parts
    }


def temporaries(folder: Path) -> list[Path]:
    """What a run that ended should never leave behind."""
    return [*folder.rglob("*.tmp"), *folder.rglob("*.old")]


def layers_of(path: Path):
    """The layers of a checkpoint file."""
    header = read_header(path)
    return layout_of(header, require_supported(header)).layers


def tags_of(merged: MergeResult) -> list[list[Tag]]:
    """Every LoRA with the exact multipliers of each checkpoint, as its prompt has them."""
    names = [path.stem for path in merged.loras]
    return [
        [
            Tag(*tag)
            for tag in zip(names, row.multipliers, row.multipliers_of("text_encoder"), strict=True)
        ]
        for row in merged.report.checkpoints
    ]


def part_multiplier(tag: Tag, part: str) -> float:
    """What counts for a layer of that part."""
    return tag.text_multiplier if part == "text_encoder" else tag.multiplier


def added(lora: State, module: str) -> Tensor:  # (m, n), float64; a single zero for no such module
    """What a host adds at multiplier 1. Source: kohya networks/lora.py merge_to."""
    if f"{module}.lora_up.weight" not in lora:
        return torch.zeros((), dtype=torch.float64)
    up = lora[f"{module}.lora_up.weight"].double().flatten(1)
    down = lora[f"{module}.lora_down.weight"].double().flatten(1)
    return up @ down * (lora[f"{module}.alpha"].double() / down.shape[0])
