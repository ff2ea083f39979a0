"""Trains a small family of checkpoints: a base, its fine-tunes, merges of them. The yardstick of fidelity.

    python benchmarks/trained.py FOLDER [--layout sd1|sdxl] [--pixels 16|32] [--base-steps N]
        [--batch N] [--length X] [--only NAME ...] [--seed N] [--device DEVICE]

Writes `FOLDER/PIXELS/models/Stable-diffusion/*.safetensors`, which hosts recognise as SD 1.x, and
`FOLDER/PIXELS/family.json` with what `function.py` needs; in the layout of SDXL, `FOLDER/sdxl-PIXELS`.
A base is trained from scratch on pictures of `pictures.py` with their names as prompts, in all
styles; the fine-tunes differ in data, length and learning rate. SDXL also learns where pictures were
cut. At 32 pixels the base goes on from that of 16, where there is one. What exists is kept, so a run
that was ended goes on, and `--only` lets several runs share the fine-tunes; `--length 0.5` halves
them. About an hour on two cores for SD 1.x, twice that for SDXL at the same options (its transformers
have their real number); the same seed and device give the same family up to rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from checkpoint_keys import load_checkpoint, save_checkpoint
from networks import NETWORKS, STEPS, TOKENS, Network
from pictures import Pictures, load_pictures
from torch import Tensor, nn

WITHOUT_PROMPT = 0.1  # of the pictures, so that guidance works
MOST_CUT = 3  # pixels that SDXL's pictures lose at the top and at the left
WHOLE = 0.5  # of the pictures lose none
FAMILY = "family.json"
CHECKPOINTS = Path("models") / "Stable-diffusion"
_REPORT = 50  # steps between two lines


@dataclass(frozen=True)
class Training:
    """One training: on which pictures, how long, how fast."""

    steps: int
    rate: float
    style: str | None = None
    theme: str | None = None
    lora_rank: int | None = None  # trains factors of this rank instead of the weights


FINE_TUNES = {
    "twemoji": Training(160, 5e-4, style="twemoji"),
    "noto": Training(100, 5e-4, style="noto"),
    "fluent": Training(200, 3e-4, style="fluent"),
    "openmoji": Training(100, 1e-3, style="openmoji"),
    "animals": Training(120, 5e-4, theme="Animals & Nature"),
    "food": Training(100, 2e-3, theme="Food & Drink", lora_rank=8),
    "travel": Training(100, 5e-4, theme="Travel & Places"),
}
MERGES = {"blend": {"twemoji": 0.5, "fluent": 0.5}}
MERGED = ("twemoji", "noto", "fluent", "openmoji", "animals", "blend")
"""The checkpoints that the tables are about; `food` is a LoRA's, `travel` is held out for fits."""


def main() -> None:
    """Trains what is missing of a family."""
    options = _options()
    torch.manual_seed(options.seed)
    folder = _family_folder(options, options.pixels)
    pictures = load_pictures(options.folder, options.pixels)
    network = NETWORKS[options.layout](options.pixels, pictures.prompts).to(options.device)
    checkpoints = folder / CHECKPOINTS
    checkpoints.mkdir(parents=True, exist_ok=True)
    trainer = _Trainer(network, pictures, options.batch, options.seed)
    base = folder / "base.safetensors"
    if not base.exists():
        smaller = _family_folder(options, 16) / "base.safetensors"
        if smaller.exists():
            network.load(load_checkpoint(smaller))
        trainer.train("base", Training(options.base_steps, options.base_rate))
        save_checkpoint(base, network.checkpoint(), torch.float32)
    family = {
        "layout": options.layout,
        "pixels": options.pixels,
        "prompts": pictures.prompts,
        "tokens": TOKENS,
        "merged": MERGED,
    }
    (folder / FAMILY).write_text(json.dumps(family), encoding="utf-8")
    for name, training in FINE_TUNES.items():
        path = checkpoints / f"{name}.safetensors"
        if name in options.only and not path.exists():
            network.load(load_checkpoint(base))
            steps = round(options.length * training.steps)
            trainer.train(name, replace(training, steps=steps))
            save_checkpoint(path, network.checkpoint())
    for name in MERGES.keys() & set(options.only):
        shares = MERGES[name]
        parts = [(x, load_checkpoint(checkpoints / f"{n}.safetensors")) for n, x in shares.items()]
        merged = {key: sum(x * state[key] for x, state in parts) for key in parts[0][1]}
        save_checkpoint(checkpoints / f"{name}.safetensors", merged)


class _Trainer:
    """Trains a network on pictures and prompts."""

    def __init__(self, network: Network, pictures: Pictures, batch: int, seed: int) -> None:
        self._network, self._pictures, self._batch = network, pictures, batch
        self._tokens = network.words.tokens(pictures.prompts)
        self._empty = network.words.tokens([""])
        self._seed = seed
        self._device = next(network.parameters()).device

    def train(self, name: str, training: Training) -> None:
        """Trains the network's weights in place."""
        generator = torch.Generator().manual_seed(self._seed)
        places = self._pictures.chosen(training.style, training.theme)
        network = self._network.train()
        loras = _Loras(network, training.lora_rank) if training.lora_rank else None
        parameters = list(loras.parameters() if loras else network.parameters())
        optimizer = torch.optim.AdamW(parameters, training.rate, weight_decay=1e-2, fused=True)
        began, total = time.monotonic(), 0.0
        for step in range(training.steps):
            for group in optimizer.param_groups:
                group["lr"] = training.rate * _warmed(step, training.steps)
            optimizer.zero_grad(set_to_none=True)
            loss = self._loss(places, generator)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            total += float(loss.detach())
            if (step + 1) % _REPORT == 0:
                seconds = (time.monotonic() - began) / (step + 1)
                line = f"{name}: step {step + 1}/{training.steps}, loss {total / _REPORT:.4f}"
                print(f"{line}, {seconds:.2f} s a step", file=sys.stderr, flush=True)
                total = 0.0
        if loras:
            loras.merge()
        network.eval()

    def _loss(self, places: Tensor, generator: torch.Generator) -> Tensor:
        count = self._batch
        chosen = places[torch.randint(len(places), (count,), generator=generator)]
        pixels, tokens = self._pictures.pixels[chosen], self._tokens[chosen].clone()
        tokens[torch.rand(count, generator=generator) < WITHOUT_PROMPT] = self._empty
        noise = torch.randn(pixels.shape, generator=generator)
        steps = torch.randint(STEPS, (count,), generator=generator)
        corners = None
        if self._network.reads_corners:
            corners = torch.randint(MOST_CUT + 1, (count, 2), generator=generator)
            corners[torch.rand(count, generator=generator) < WHOLE] = 0
            pixels = _cut(pixels, corners)
            corners = corners.to(self._device, torch.float32)
        noisy = self._network.noisy(pixels, noise, steps).to(self._device)
        inputs = (noisy, steps.to(self._device), tokens.to(self._device), corners)
        predicted = self._network(*inputs)
        return (predicted - noise.to(self._device)).square().mean()


class _Loras(nn.Module):
    """Trainable factors beside every matrix and convolution, as kohya's LoCon trains them."""

    def __init__(self, network: Network, rank: int) -> None:
        super().__init__()
        network.requires_grad_(requires_grad=False)
        self._network = [network]  # in a list: its parameters are not ours
        self.ups = nn.ParameterList()
        self.downs = nn.ParameterList()
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                m, n = module.weight.flatten(1).shape
                up = nn.Parameter(torch.zeros(m, min(rank, m, n), device=module.weight.device))
                down = nn.Parameter(torch.randn(up.shape[1], n).to(up) / n**0.5)
                self.ups.append(up)
                self.downs.append(down)
                nn.utils.parametrize.register_parametrization(module, "weight", _Added(up, down))

    def merge(self) -> None:
        """Adds the factors to the weights, which are trained again from then on."""
        network = self._network[0]
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.utils.parametrize.remove_parametrizations(module, "weight")
        network.requires_grad_()


class _Added(nn.Module):
    """Adds a product of factors to a weight."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self._factors = (up, down)

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the weight with the product added."""
        up, down = self._factors
        return weight + (up @ down).view_as(weight)


def _cut(pixels: Tensor, corners: Tensor) -> Tensor:
    """Returns pictures without what is above and left of the corners, and empty at the other sides."""
    empty = nn.functional.pad(pixels, (0, MOST_CUT, 0, MOST_CUT), value=-1.0)
    height, width = pixels.shape[2:]
    return torch.stack(
        [
            picture[:, top : top + height, left : left + width]
            for picture, (top, left) in zip(empty, corners.tolist(), strict=True)
        ]
    )


def _warmed(step: int, steps: int) -> float:
    """Returns the factor of the learning rate: a short rise, then half a cosine."""
    rise = max(steps // 20, 1)
    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * step / steps))


def _family_folder(options: argparse.Namespace, pixels: int) -> Path:
    layout = "" if options.layout == "sd1" else f"{options.layout}-"
    return options.folder / f"{layout}{pixels}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", choices=tuple(NETWORKS), default="sd1")
    parser.add_argument("--pixels", type=int, choices=(16, 32), default=16)
    parser.add_argument("--base-steps", type=int, default=800)
    parser.add_argument("--base-rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=float, default=1.0)
    names = (*FINE_TUNES, *MERGES)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
