"""Tiny checkpoints of the real structure, and what tests do with files."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyper_merge.analysis.streaming_pass import PassOptions, stream_layers
from hyper_merge.checkpoints.architectures.detection import require_supported
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.decomposition.initialization import SearchEffort
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

# They mark a file as SD 1.x, and have every kind of layer once, of more than one width.
KEPT = re.compile(
    r"model\.diffusion_model\.(time_embed|input_blocks\.(0|1\.0|3)|out)\..*"
    r"|.*\.input_blocks\.1\.1\.(norm|proj|transformer_blocks\.0\.(attn2|ff|norm)).*"
    r"|.*\.middle_block\.1\.(norm|transformer_blocks\.0\.(attn1|norm1)).*"
    r"|.*\.output_blocks\.2\.0\.(in_layers|skip_connection)\..*"
    r"|.*\.input_blocks\.([47]\.1\.transformer_blocks\.0\.norm1\.bias|[69]\.0\.op\.bias)"
    r"|.*text_model\.(embeddings|encoder\.layers\.0|final_layer_norm)\..*"
    r"|first_stage_model\.(quant_conv|post_quant_conv|encoder\.conv_in|decoder\.norm_out)\..*"
)

# They still do, with one layer of each shape of matrix: where every layer passes between processes.
FEW = re.compile(
    r"model\.diffusion_model\.(input_blocks\.(0\.0\.weight|3\.0\.op\.weight|[369]\.0\.op\.bias"
    r"|[147]\.1\.transformer_blocks\.0\.norm1\.bias|1\.1\.transformer_blocks\.0\.attn2\.to_[kq]\.weight)"
    r"|middle_block\.1\.transformer_blocks\.0\.attn1\.to_q\.weight|out\.2\.weight)"
    r"|.*text_model\.encoder\.layers\.0\.(mlp\.fc1|self_attn\.q_proj)\..*"
    r"|first_stage_model\.quant_conv\.weight"
)

Exact = Mapping[str, Tensor]  # key -> (k, *shape), float32, or int64 for position ids
State = dict[str, Tensor]


def few_of(state: State) -> State:
    """Returns the tensors of a few layers."""
    return {key: tensor for key, tensor in state.items() if FEW.fullmatch(key)}


def write(path: Path, state: State) -> Path:
    """Writes a checkpoint file of the kind of its suffix."""
    if path.suffix == ".ckpt":
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        save_file(state, path)
    return path


def load(path: Path) -> State:
    """Returns all tensors of a checkpoint file."""
    if path.suffix == ".ckpt":
        return torch.load(path, weights_only=True)["state_dict"]
    return load_file(path)


def write_unfinished(path: Path, source: Path, share: float) -> Path:
    """Writes a copy as an unfinished download leaves it: of the whole size, with zeros at its end."""
    content = source.read_bytes()
    end = int(len(content) * share)
    path.write_bytes(content[:end] + bytes(len(content) - end))
    return path


def recipe(models, output: Path, **settings: Any) -> Recipe:
    """Returns a small merge's recipe, without companions or 8 bits unless they are asked for."""
    small = {"name": "mix", "ranks": RANKS, "iterations": 3, "device": "cpu", "exact": "none"}
    small |= {"lora_dtype": "same"}
    values = {**small, **settings}
    return Recipe.from_settings({**values, "models": tuple(models), "output": output}, "recipe")


def merge(
    models,
    output: Path,
    progress: Progress | None = None,
    effort: SearchEffort = SearchEffort.QUICK,
    **settings: Any,
) -> MergeResult:
    """Runs a small merge, with a short search for a start."""
    preflight = run_preflight(recipe(models, output, **settings))
    return run_merge(preflight, progress or Progress(), effort=effort)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Returns the content of every file by relative path, hidden ones included, but for the cache."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "cache" not in path.parts
    }


def temporaries(folder: Path) -> list[Path]:
    """Returns the files that a run which ended should never leave behind."""
    return [*folder.rglob("*.tmp"), *folder.rglob("*.old")]


def layers_of(path: Path, *, ends: bool = False):
    """Returns the layers of a checkpoint file, without end layers unless they are asked for."""
    header = read_header(path)
    layout = layout_of(header, require_supported(header))
    return (layout if ends else layout.without_ends()).layers


def tags_of(merged: MergeResult) -> list[list[Tag]]:
    """Returns every LoRA with the exact multipliers of each checkpoint, as its prompt has them."""
    names = [path.stem for path in merged.loras]
    return [
        [
            Tag(*tag)
            for tag in zip(names, row.multipliers, row.multipliers_of("text_encoder"), strict=True)
        ]
        for row in merged.report.checkpoints
    ]


def part_multiplier(tag: Tag, part: str) -> float:
    """Returns the multiplier that counts for a layer of that part."""
    return tag.text_multiplier if part == "text_encoder" else tag.multiplier


def added(lora: State, module: str) -> Tensor:  # (m, n), float64; a single zero for no such module
    """Returns what a host adds at multiplier 1. Source: kohya networks/lora.py merge_to.

    A1111, Forge and ComfyUI also take one whole tensor for a module.
    """
    if f"{module}.diff" in lora:
        return lora[f"{module}.diff"].double().flatten(1)
    if f"{module}.lora_up.weight" not in lora:
        return torch.zeros((), dtype=torch.float64)
    up = lora[f"{module}.lora_up.weight"].double().flatten(1)
    down = lora[f"{module}.lora_down.weight"].double().flatten(1)
    return up @ down * (lora[f"{module}.alpha"].double() / down.shape[0])


def leftovers(models, hyper_model, loras, rows):
    """Returns squared norms of deviations and of errors, (layers, k) each, from the files on disk.

    `rows` has a list of prompt tags per checkpoint.
    """
    base, checkpoints = load(hyper_model), [load(path) for path in models]
    loras = {name: load_file(path) for name, path in loras.items()}
    energies, errors = [], []
    for layer in layers_of(models[0]):
        weight = base[layer.key].double().flatten(1)
        blocks = {name: added(lora, layer.module) for name, lora in loras.items()}
        deviations = [c[layer.key].double().flatten(1) - weight for c in checkpoints]
        rests = [
            deviation - sum(part_multiplier(tag, layer.part) * blocks[tag.name] for tag in row)
            for deviation, row in zip(deviations, rows, strict=True)
        ]
        energies.append([float(d.square().sum()) for d in deviations])
        errors.append([float(r.square().sum()) for r in rests])
    return torch.tensor(energies).double(), torch.tensor(errors).double()


def losses(models, merged, rows):
    """Returns the loss, and explained shares by checkpoint in all layers, UNet, text encoder."""
    loras = {path.stem: path for path in merged.loras}
    energies, errors = leftovers(models, merged.place.hyper_model, loras, rows)
    parts = [layer.part for layer in layers_of(models[0])]
    masks = [torch.tensor([p in which for p in parts]) for which in (parts, "unet", "text_encoder")]
    shares = [1 - errors[mask].sum(0) / energies[mask].sum(0) for mask in masks]
    return float(errors.sum() / energies.sum()), torch.stack(shares, 1)


def reported_shares(merged):
    rows = merged.report.checkpoints
    return torch.tensor([[r.explained, r.explained_unet, r.explained_text_encoder] for r in rows])


class Stop:
    """Ends a run at a fraction of its work, by should_stop or as Ctrl-C does."""

    def __init__(self, at: float, how: str) -> None:
        self.at, self.how, self.reached = at, how, 0.0
        self.late = 0  # reports after the request to stop

    def on_progress(self, phase, fraction):
        self.late += self.reached >= self.at
        self.reached = fraction
        if self.how == "interrupt" and fraction >= self.at:
            raise KeyboardInterrupt

    def should_stop(self):
        return self.how == "stop" and self.reached >= self.at

    @property
    def progress(self):
        return Progress(self.on_progress, self.should_stop)


def inputs_of(models, **settings):
    return run_preflight(recipe(models, models[0].parent / "models", **settings)).inputs


def run_pass(inputs, width=512, progress=None, device=None):
    """Returns averages and layers of a pass, with what LoRAs do not carry."""
    averages, layers = {}, {}
    outside = stream_layers(
        inputs,
        PassOptions(device or torch.device("cpu"), 0, width),
        averages.__setitem__,
        lambda layer: layers.__setitem__(layer.index, layer),
        progress or Progress(),
    )
    return averages, layers, outside


class WarningLog:
    """The warnings of a run."""

    def __init__(self):
        self.warnings = []
        self.progress = Progress(warn=self.warnings.append)
