"""Fidelity of function: what the written files do in the network, on a family of `trained.py`.

    python benchmarks/function.py FAMILY [--budgets 5 10 20 40] [--setting NAME="KEY=VALUE ..." ...]
        [--inputs N] [--pictures] [--device DEVICE]

FAMILY is a folder that `trained.py` wrote, such as FOLDER/16 or FOLDER/sdxl-16. Merges it at sizes
given in percent of one checkpoint's bytes, all files counted, and applies the written files as hosts
do. Every checkpoint and its reconstruction see the same noisy pictures, timesteps and prompts, each
with its own text encoders; the table has the mean over the checkpoints of

    |output of the reconstruction - original's|^2 / |output of the average - original's|^2

in squared norms, the worst checkpoint, and with `--pictures` the mean difference of pixels (25 DDIM
steps, guidance 3, same seed) as a fraction of the average's. Settings are those of a
recipe. Private LoRAs are solved here by dense SVD, in plain weights and in the metric of
the default; "exact layers" is the floor of anything that LoRAs carry.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from checkpoint_keys import load_checkpoint
from networks import NETWORKS, STEPS, State
from pictures import load_pictures
from safetensors.torch import load_file
from tables import table
from torch import Tensor
from trained import CHECKPOINTS, FAMILY

from hyper_merge.analysis.loss_weights import layer_factors
from hyper_merge.checkpoints.architectures.detection import require_supported
from hyper_merge.checkpoints.architectures.layout import Layer, layout_of
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.loras.prompt_tags import parse_tags
from hyper_merge.operations.merge.merge import MergeResult, run_merge
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.recipe.loading import recipe_from_options
from hyper_merge.runs.folders import MULTIPLIERS
from hyper_merge.runtime.progress import Progress

INPUTS = 256  # noisy pictures that all networks see
EARLY_TOKENS = 24  # of a prompt, in families that do not say
DRAWN = 32  # prompts of which pictures are drawn
GUIDANCE = 3.0
DDIM_STEPS = 25
SETTINGS = {
    "default": "",
    "layout": "layer_weights=layout",
    "relative": "layer_weights=relative",
    "plain": "layer_weights=plain",
}


@dataclass
class Row:
    """How near reconstructions come to the originals, by checkpoint."""

    megabytes: float
    losses: list[float] = field(default_factory=list)  # of function, fractions of the average's
    pixels: list[float] = field(default_factory=list)  # fractions of the average's

    def cells(self, name: str) -> tuple[str, ...]:
        """Its row of the table."""
        shown = f"{fmean(self.pixels):.3f}" if self.pixels else ""
        mean, worst = fmean(self.losses), max(self.losses)
        return (name, f"{self.megabytes:.2f}", f"{mean:.4f}", f"{worst:.4f}", shown)


class Judge:
    """The network of a family, with the same inputs for all weights."""

    def __init__(self, folder: Path, device: str = "cpu", inputs: int = INPUTS) -> None:
        family = json.loads((folder / FAMILY).read_text(encoding="utf-8"))
        self.paths = [folder / CHECKPOINTS / f"{name}.safetensors" for name in family["merged"]]
        make = NETWORKS[family.get("layout", "sd1")]  # early families do not say
        tokens = family.get("tokens", EARLY_TOKENS)
        self.network = make(family["pixels"], family["prompts"], tokens).to(device).eval()
        pictures = load_pictures(folder.parent, family["pixels"])
        generator = torch.Generator().manual_seed(1)
        chosen = torch.randint(len(pictures.pixels), (inputs,), generator=generator)
        noise = torch.randn((inputs, *pictures.pixels.shape[1:]), generator=generator)
        self._steps = torch.linspace(5, STEPS - 5, inputs).long().to(device)
        noisy = self.network.noisy(pictures.pixels[chosen], noise, self._steps.cpu())
        self._noisy = noisy.to(device)
        prompts = [family["prompts"][i] for i in chosen.tolist()]
        self._tokens = self.network.words.tokens(prompts).to(device)

    @torch.no_grad()
    def outputs(self, state: State) -> Tensor:  # (inputs, 4, size, size)
        """Returns what the network with these weights predicts."""
        self.network.load(state)
        batches = zip(*(t.split(64) for t in (self._noisy, self._steps, self._tokens)), strict=True)
        return torch.cat([self.network(*batch) for batch in batches])

    def drawn(self, state: State) -> Tensor:  # (prompts, 4, size, size)
        """Returns pictures of the first prompts."""
        self.network.load(state)
        return self.network.draw(self._tokens[:DRAWN], DDIM_STEPS, GUIDANCE, seed=2)


class Bench:
    """Original checkpoints, their average, and their outputs."""

    def __init__(self, judge: Judge, *, pictures: bool) -> None:
        self.judge = judge
        self.states = [load_checkpoint(path) for path in judge.paths]
        count = len(self.states)
        self.average = {
            key: sum(state[key] for state in self.states) / count for key in self.states[0]
        }
        self._outputs = [judge.outputs(state) for state in self.states]
        plain = judge.outputs(self.average)
        self._of_average = [_distance(plain, output) for output in self._outputs]
        self._drawn = [judge.drawn(state) for state in self.states] if pictures else []
        if pictures:
            drawn = judge.drawn(self.average)
            self._drawn_of_average = [float((drawn - own).abs().mean()) for own in self._drawn]
        header = read_header(judge.paths[0])
        self.layers = layout_of(header, require_supported(header)).layers
        self.bytes = judge.paths[0].stat().st_size

    def row(self, reconstructions: Iterator[State], megabytes: float = 0.0) -> Row:
        """Returns how near reconstructions come, one of every checkpoint."""
        row = Row(megabytes)
        for place, state in enumerate(reconstructions):
            distance = _distance(self.judge.outputs(state), self._outputs[place])
            row.losses.append(distance / self._of_average[place])
            if self._drawn:
                pixels = (self.judge.drawn(state) - self._drawn[place]).abs().mean()
                row.pixels.append(float(pixels) / self._drawn_of_average[place])
        return row

    def exact(self) -> Iterator[State]:
        """Yields the average with every layer exact."""
        for state in self.states:
            yield {**self.average, **{layer.key: state[layer.key] for layer in self.layers}}

    def private(self, budget: float, weighting: str) -> Iterator[State]:
        """Yields the average with the best private LoRA of a share of the budget, by dense SVD."""
        sizes = torch.stack([_weight(self.average, x).double().square().sum() for x in self.layers])
        factors = layer_factors(weighting, sizes, self.layers)
        svds = []
        for state in self.states:
            for layer, factor in zip(self.layers, factors.tolist(), strict=True):
                delta = _weight(state, layer) - _weight(self.average, layer)
                u, s, v = torch.linalg.svd(delta.flatten(1), full_matrices=False)
                svds.append((layer, (u * s, v), s.double().square() * factor))
        gains = torch.cat([gain / (x.m + x.n) for x, _, gain in svds])
        prices = torch.cat([torch.full((len(gain),), 2.0 * (x.m + x.n)) for x, _, gain in svds])
        ranking = gains.argsort(descending=True)
        least = gains[ranking][int((prices[ranking].cumsum(0) <= budget).sum()) - 1]
        for place in range(len(self.states)):
            state = {key: tensor.clone() for key, tensor in self.average.items()}
            for layer, (up, down), gain in svds[place * len(self.layers) :][: len(self.layers)]:
                rank = int((gain / (layer.m + layer.n) >= least).sum())
                weight = _weight(state, layer)
                weight += (up[:, :rank] @ down[:rank]).view_as(weight)
            yield state


def reconstructions(result: MergeResult, layers: Sequence[Layer]) -> Iterator[State]:
    """Yields every checkpoint of a merge as a host makes it, from the written files."""
    average = load_checkpoint(result.place.hyper_model)
    files = {path.stem: load_file(path) for path in result.loras}
    lines = (result.place.folder / MULTIPLIERS).read_text(encoding="utf-8").splitlines()
    for line in lines:
        state = {key: tensor.clone() for key, tensor in average.items()}
        for tag in parse_tags(line):
            for layer in layers:
                factor = tag.text_multiplier if layer.part == "text_encoder" else tag.multiplier
                added = _added(files[tag.name], layer.module)
                if added is not None:
                    weight = _weight(state, layer)
                    weight += factor * added.view_as(weight)
        yield state


def _weight(state: State, layer: Layer) -> Tensor:
    """Returns a layer's weight in a checkpoint: a tensor, or rows of one."""
    weight = state[layer.key]
    return weight[slice(*layer.rows)] if layer.rows else weight


def _added(lora: Mapping[str, Tensor], module: str) -> Tensor | None:
    """Returns what a host adds at multiplier 1. Source: kohya networks/lora.py merge_to."""
    if (diff := lora.get(f"{module}.diff")) is not None:
        return diff.float()
    if (up := lora.get(f"{module}.lora_up.weight")) is None:
        return None
    down = lora[f"{module}.lora_down.weight"].float().flatten(1)
    return up.float().flatten(1) @ down * (float(lora[f"{module}.alpha"]) / len(down))


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().mean())


def merge(bench: Bench, folder: Path, name: str, options: str) -> MergeResult:
    """Merges the family with settings of a recipe, as `key=value key=value`."""
    words = dict(word.split("=", 1) for word in options.split())
    models = [str(path) for path in bench.judge.paths]
    recipe = recipe_from_options({"name": name, "models": models, "output": str(folder), **words})
    return run_merge(run_preflight(recipe), Progress())


def main() -> None:
    """Prints the table."""
    options = _options()
    settings = dict(text.split("=", 1) for text in options.setting) or SETTINGS
    bench = Bench(Judge(options.folder, options.device, options.inputs), pictures=options.pictures)
    rows: dict[str, Row] = {}

    def add(name: str, reconstructions: Iterator[State], written: float = 0.0) -> None:
        rows[name] = bench.row(reconstructions, written)
        print(*rows[name].cells(name), sep="  ", file=sys.stderr, flush=True)

    add("average alone", (bench.average for _ in bench.states))
    add("exact layers", bench.exact())
    for percent in options.budgets:
        budget = percent / 100 * bench.bytes
        for name, words in settings.items():
            out = options.folder / "runs" / f"{name}-{percent:g}"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            result = merge(bench, out, "merged", f"budget={int(budget)} {words}")
            written = sum(path.stat().st_size for path in result.loras) / 1e6
            add(f"{percent:g} % {name}", reconstructions(result, bench.layers), written)
        for weighting in ("plain", "output"):
            private = bench.private(budget, weighting)
            add(f"{percent:g} % private, {weighting}", private, budget / 1e6)
    heads = ("", "MB", "function", "worst", "pixels")
    print(table(heads, [row.cells(name) for name, row in rows.items()]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--budgets", type=float, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=KEY=VALUE ...")
    parser.add_argument("--inputs", type=int, default=INPUTS)
    parser.add_argument("--pictures", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
