"""What a loss in weights means in function: outputs of the real SD 1.x UNet, by diffusers.

    python benchmarks/function.py FOLDER [RUN ...] [--latent N] [--timesteps T ...] [--texts 2]

FOLDER is a WebUI-shaped models folder with runs of one family of SD 1.x, full-size or narrow, as
`families.py` leaves them (`benchmark-data/narrow/usual/out`); without names all of its runs are taken.
Every checkpoint's UNet and its reconstruction (hyper-model + multipliers * LoRAs, from the written
files, in float32) see the same random latents and text embeddings at several timesteps. The table
has the mean over checkpoints, and the worst checkpoint, of |difference| / |output|, beside losses:

    loss       of the report: all layers, text encoder too
    UNet       the same over the layers of the UNet, measured here from the files
    relative   over these layers, each deviation in units of the norm of its own weight

"Exact layers" has every layer right, end layers too, and only the rest averaged: no LoRAs go below it.
Of companions (`exact`) the end layers are taken, norms and biases are left out. Latents have 32x32 entries, in narrow families 16x16.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tables import table
from torch import Tensor, nn

from hyper_merge.checkpoints.architectures.detection import require_supported
from hyper_merge.checkpoints.architectures.layout import Layer, layout_of
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.loras.prompt_tags import parse_tags
from hyper_merge.recipe.recipe import AVERAGE
from hyper_merge.runs.folders import MULTIPLIERS, Folders
from hyper_merge.runs.run import Run, list_runs, load_run
from hyper_merge.synthetic.checkpoint_layouts import UNET_PREFIX

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries, on being imported
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

HEADS = ("run", "loss", "UNet", "relative", "mean error", "worst", "/ average alone")
SANE = (0.05, 20.0)  # standard deviation of whatever a block of the UNet gives

State = dict[str, Tensor]  # of a checkpoint's UNet, by its own keys


@dataclass
class Row:
    """What is known of one run, or of a yardstick."""

    loss: float  # of the report
    lost: Tensor = field(default_factory=lambda: torch.zeros(2))  # by plain and relative weight
    of: Tensor = field(default_factory=lambda: torch.zeros(2))  # the average's
    errors: list[float] = field(default_factory=list)  # of outputs, by checkpoint

    def cells(self, name: str, average: Row) -> tuple[str, ...]:
        """Its row of the table."""
        plain, relative = (self.lost / self.of).tolist()
        mean, other = fmean(self.errors), fmean(average.errors)
        losses = (f"{x:.4f}" for x in (self.loss, plain, relative, mean, max(self.errors)))
        return (name, *losses, f"{mean / other:.3f}")


class Judge:
    """The UNet of one family, with the same inputs for all weights."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        header = read_header(path)
        family = require_supported(header)
        if family.name != "sd1":
            raise SystemExit(f"expected checkpoints of SD 1.x, {path} is one of {family.title}")
        layers = layout_of(header, family).layers
        self.layers: list[Layer] = [layer for layer in layers if layer.part == "unet"]
        shapes = {key.removeprefix(UNET_PREFIX): t.shape for key, t in header.tensors.items()}
        width = shapes["input_blocks.0.0.weight"][0]
        context = shapes["input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"][1]
        with torch.device("meta"):
            self.unet = UNet2DConditionModel(
                block_out_channels=tuple(width * factor for factor in (1, 2, 4, 4)),
                cross_attention_dim=context,
            ).eval()
        latent = options.latent or (32 if width >= 320 else 16)
        self.steps, self.latents, self.texts = _inputs(options, latent, context)

    @torch.no_grad()
    def outputs(self, state: Mapping[str, Tensor]) -> Tensor:  # (inputs, 4, latent, latent)
        """Returns the UNet's outputs with these weights."""
        self.unet.to("meta")  # lets go of the last weights
        floats = {key: tensor.float() for key, tensor in state.items()}
        weights = convert_ldm_unet_checkpoint(floats, dict(self.unet.config))
        self.unet.load_state_dict(weights, strict=True, assign=True)
        return self.unet(self.latents, self.steps, self.texts).sample

    def watched_outputs(self, state: Mapping[str, Tensor]) -> tuple[Tensor, float, float]:
        """Returns the outputs, and the range of standard deviations of the blocks' outputs."""
        deviations: list[float] = []

        def keep(_module: nn.Module, _inputs: object, output: object) -> None:
            deviations.append(float((output[0] if isinstance(output, tuple) else output).std()))

        unet = self.unet
        blocks = (unet.conv_in, *unet.down_blocks, unet.mid_block, *unet.up_blocks, unet.conv_out)
        hooks = [block.register_forward_hook(keep) for block in blocks]
        outputs = self.outputs(state)
        for hook in hooks:
            hook.remove()
        return outputs, min(deviations), max(deviations)


def main() -> None:
    """Prints the table of all runs."""
    options = _options()
    runs = _runs(Folders.under(options.folder), options.runs)
    judge = Judge(runs[0].hyper_model, options)
    average = unet_state(runs[0].hyper_model)
    plain, low, high = judge.watched_outputs(average)
    print(
        f"{len(judge.steps)} inputs; the blocks' outputs have deviations of {low:.2f} to {high:.2f}"
    )
    if not SANE[0] < low < high < SANE[1]:
        raise SystemExit(f"activations vanish or explode: expected deviations within {SANE}")
    rows = {"average alone": Row(1.0), "exact layers": Row(0.0)}
    rows |= {run.name: Row(run.report.loss) for run in runs}
    for place, source in enumerate(runs[0].sources):
        original = unet_state(source.path)
        expected = judge.outputs(original)
        rows["average alone"].errors.append(relative_error(plain, expected))
        for name, state in _candidates(judge, average, original, runs, place):
            _weigh(rows[name], judge.layers, (state, average, original))
            if name != "average alone":
                rows[name].errors.append(relative_error(judge.outputs(state), expected))
        print(f"{source.name}: done", file=sys.stderr, flush=True)
    print(table(HEADS, [row.cells(name, rows["average alone"]) for name, row in rows.items()]))


def unet_state(path: Path) -> State:
    """Returns the UNet of a checkpoint file, in the file's types."""
    with safe_open(path, framework="pt") as file:
        keys = [key for key in file.keys() if key.startswith(UNET_PREFIX)]  # noqa: SIM118
        return {key: file.get_tensor(key) for key in keys}


def reconstructed(
    average: State, run: Run, place: int, layers: Sequence[Layer]
) -> State:  # float32 where LoRAs reach
    """Returns the average with all LoRAs, by a checkpoint's multipliers as hosts read them."""
    line = (run.folder / MULTIPLIERS).read_text(encoding="utf-8").splitlines()[place]
    files = {path.stem: path for path in run.loras}
    loras = [(tag.multiplier, load_file(files[tag.name])) for tag in parse_tags(line)]
    state = dict(average)
    for layer in layers:
        weight = average[layer.key].float().flatten(1)
        for multiplier, lora in loras:
            if f"{layer.module}.diff" in lora:
                weight = weight + multiplier * lora[f"{layer.module}.diff"].flatten(1)
            elif f"{layer.module}.lora_up.weight" in lora:
                weight = weight + multiplier * _added(lora, layer.module)
        state[layer.key] = weight.view(average[layer.key].shape)
    return state


def relative_error(
    outputs: Tensor,  # (inputs, ...)
    expected: Tensor,  # (inputs, ...)
) -> float:
    """Returns the mean over the inputs of |outputs - expected| / |expected|."""
    differences, norms = (
        tensor.flatten(1).norm(dim=1) for tensor in (outputs - expected, expected)
    )
    return float((differences / norms).mean())


def _added(lora: Mapping[str, Tensor], module: str) -> Tensor:  # (m, n)
    """Returns what a host adds at multiplier 1. Source: kohya networks/lora.py merge_to."""
    up = lora[f"{module}.lora_up.weight"].float().flatten(1)
    down = lora[f"{module}.lora_down.weight"].float().flatten(1)
    return up @ down * (float(lora[f"{module}.alpha"]) / len(down))


def _candidates(
    judge: Judge, average: State, original: State, runs: Sequence[Run], place: int
) -> Iterator[tuple[str, State]]:
    """Yields all that stands for a checkpoint, with its name in the table, one at a time."""
    yield "average alone", average
    yield "exact layers", {**average, **{layer.key: original[layer.key] for layer in judge.layers}}
    for run in runs:
        yield run.name, reconstructed(average, run, place, judge.layers)


def _weigh(row: Row, layers: Sequence[Layer], states: tuple[State, State, State]) -> None:
    """Adds one checkpoint's differences in weights."""
    for layer in layers:
        state, average, original = (state[layer.key].float() for state in states)
        lost, energy, norm = (
            float(x.square().sum()) for x in (original - state, original - average, average)
        )
        row.lost += torch.tensor([lost, lost / norm])
        row.of += torch.tensor([energy, energy / norm])


def _inputs(
    options: argparse.Namespace, latent: int, context: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns timesteps, latents and text embeddings: every timestep with every text."""
    generator = torch.Generator().manual_seed(options.seed)
    texts = torch.randn(options.texts, 77, context, generator=generator)
    pairs = list(product(options.timesteps, range(options.texts)))
    latents = torch.randn(len(pairs), 4, latent, latent, generator=generator)
    steps, chosen = torch.tensor(pairs).T
    return steps, latents, texts[chosen]


def _runs(folders: Folders, names: Sequence[str]) -> list[Run]:
    """Returns the runs of these names, or all, the oldest first; of the same checkpoints only."""
    runs = [load_run(folders, name) for name in names] or list_runs(folders)[0][::-1]
    if not runs:
        raise SystemExit(f"expected runs in {folders.runs}, found none; merge there first")
    if len({(run.hyper_model, tuple(source.sha256 for source in run.sources)) for run in runs}) > 1:
        raise SystemExit("expected runs of the same checkpoints, got several; name the runs")
    if any(run.recipe.base != AVERAGE for run in runs):
        raise SystemExit("expected runs around the average, got one with another base")
    if missing := [str(path) for run in runs for path in run.missing]:
        raise SystemExit(f"missing: {', '.join(missing)}")
    return runs


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--latent", type=int, help="height and width")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[50, 300, 600, 900])
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
