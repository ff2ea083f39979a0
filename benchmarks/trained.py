"""Trains a small family of checkpoints: a base, its fine-tunes, merges of them. The yardstick of fidelity.

    python benchmarks/trained.py FOLDER [--pixels 16|32] [--base-steps N] [--seed N] [--device DEVICE]

Writes `FOLDER/PIXELS/models/Stable-diffusion/*.safetensors`, which hosts recognise as SD 1.x, and
`FOLDER/PIXELS/family.json` with what `function.py` needs. A base is trained from scratch on pictures of
`pictures.py` with their names as prompts, in all styles; the fine-tunes differ in data, length and
learning rate. At 32 pixels the base goes on from that of 16, where there is one. What exists is kept,
so a run that was ended goes on. About an hour on two cores for each size; the same seed and device
give the same family up to rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from networks import STEPS, Network, Size, Words, load_checkpoint, save_checkpoint
from pictures import Pictures, load_pictures
from torch import Tensor, nn

BATCH = 32
WITHOUT_PROMPT = 0.1  # of the pictures, so that guidance works
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
    folder = options.folder / str(options.pixels)
    pictures = load_pictures(options.folder, options.pixels)
    words = Words(pictures.prompts)
    network = Network(Size(options.pixels), len(words)).to(options.device)
    checkpoints = folder / CHECKPOINTS
    checkpoints.mkdir(parents=True, exist_ok=True)
    trainer = _Trainer(network, pictures, words, options.seed)
    base = folder / "base.safetensors"
    if not base.exists():
        smaller = options.folder / "16" / "base.safetensors"
        if smaller.exists():
            network.load(load_checkpoint(smaller))
        trainer.train("base", Training(options.base_steps, options.base_rate))
        save_checkpoint(base, network.checkpoint(), torch.float32)
    (folder / FAMILY).write_text(
        json.dumps({"pixels": options.pixels, "prompts": pictures.prompts, "merged": MERGED}),
        encoding="utf-8",
    )
    for name, training in FINE_TUNES.items():
        path = checkpoints / f"{name}.safetensors"
        if not path.exists():
            network.load(load_checkpoint(base))
            trainer.train(name, training)
            save_checkpoint(path, network.checkpoint())
    for name, shares in MERGES.items():
        parts = [(x, load_checkpoint(checkpoints / f"{n}.safetensors")) for n, x in shares.items()]
        merged = {key: sum(x * state[key] for x, state in parts) for key in parts[0][1]}
        save_checkpoint(checkpoints / f"{name}.safetensors", merged)


class _Trainer:
    """Trains a network on pictures and prompts."""

    def __init__(self, network: Network, pictures: Pictures, words: Words, seed: int) -> None:
        self._network, self._pictures = network, pictures
        self._tokens = words.tokens(pictures.prompts)
        self._empty = words.tokens([""])
        self._seed = seed
        self._device = next(network.parameters()).device

    def train(self, name: str, training: Training) -> None:
        """Trains the network's weights in place."""
        generator = torch.Generator().manual_seed(self._seed)
        places = self._pictures.chosen(training.style, training.theme)
        network = self._network.train()
        loras = _Loras(network, training.lora_rank) if training.lora_rank else None
        parameters = list(loras.parameters() if loras else network.parameters())
        optimizer = torch.optim.AdamW(parameters, training.rate, weight_decay=1e-2)
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
        chosen = places[torch.randint(len(places), (BATCH,), generator=generator)]
        pixels, tokens = self._pictures.pixels[chosen], self._tokens[chosen].clone()
        tokens[torch.rand(BATCH, generator=generator) < WITHOUT_PROMPT] = self._empty
        noise = torch.randn(pixels.shape, generator=generator)
        steps = torch.randint(STEPS, (BATCH,), generator=generator)
        noisy = self._network.noisy(pixels, noise, steps).to(self._device)
        predicted = self._network(noisy, steps.to(self._device), tokens.to(self._device))
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


def _warmed(step: int, steps: int) -> float:
    """Returns the factor of the learning rate: a short rise, then half a cosine."""
    rise = max(steps // 20, 1)
    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * step / steps))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pixels", type=int, choices=(16, 32), default=16)
    parser.add_argument("--base-steps", type=int, default=800)
    parser.add_argument("--base-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
