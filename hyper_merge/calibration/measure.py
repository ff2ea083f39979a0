"""Measures by runs of the network how much its output depends on each layer.

The sensitivity of a layer with weight W is E ||d(v . output) / dW||^2 over v of unit normal entries,
noise levels and prompts, by output and entry of W: the mean squared change of the output for a
random change of the weight, per squared size of that change. Latents are pure noise and prompts
random tokens: on trained families the numbers are those of pictures and their prompts.

The average itself runs, from its file, in float32, a block at a time, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import torch
from torch import Tensor

from hyper_merge.calibration.text_encoders import Encoded, TextEncoder
from hyper_merge.calibration.unet import UNet, is_whole, time_embedding
from hyper_merge.checkpoints.architectures.layout import Layer, Layout
from hyper_merge.checkpoints.architectures.spec import Family
from hyper_merge.checkpoints.io.header import Shape
from hyper_merge.runtime.progress import Progress

PHASE: Final = "running the average"
STEPS: Final = 1000  # of every schedule

_TOKENS: Final = 77
_PIXELS: Final = 8  # in height and width, for one of the latents
_RUNS: Final = (
    6.0  # forward, forward again, backward for inputs and weights; small products are slow
)
_ENTRY: Final = 200.0  # multiply-adds that reading an entry and squaring its gradient take
_HEADS_OF_SD1: Final = 8
_HEAD: Final = 64  # channels of a head of later families
_NUMBER: Final = 256  # entries by which SDXL reads a number, such as the height of the picture
_WITHOUT: Final = ("sdxl_edm", "sdxl_edm_v")  # they read noise levels in another form


@dataclass(frozen=True)
class Samples:
    """How many inputs the network sees, and of which size."""

    passes: int = 2
    batch: int = 8  # of a pass
    side: int = 16  # height and width of the latents


DEFAULT_SAMPLES: Final = Samples()


def can_run(layout: Layout, shapes: Mapping[str, Shape]) -> bool:
    """Tells whether the network of a checkpoint can be run here: by its family, and if it is whole."""
    family = layout.family
    if _kind(family) not in _ENCODERS or family.name in _WITHOUT:
        return False
    (part,) = (part for part in family.parts if part.name == "unet")
    return is_whole(shapes, part.prefix)


def measuring_cost(layout: Layout, samples: Samples = DEFAULT_SAMPLES) -> float:
    """Returns what `measure_sensitivities` takes, in multiply-adds of large products."""
    shrunk = (samples.side * _PIXELS / layout.family.resolution) ** 2
    of_one = sum(
        layer.m * layer.n * (layer.positions * shrunk if layer.part == "unet" else layer.positions)
        for layer in layout.layers
    )
    reading = _ENTRY * sum(layer.m * layer.n for layer in layout.layers)
    return samples.passes * (_RUNS * samples.batch * of_one + reading)


def measure_sensitivities(
    tensor: Callable[[str], Tensor],
    shapes: Mapping[str, Shape],
    layout: Layout,
    device: torch.device,
    progress: Progress,
    samples: Samples = DEFAULT_SAMPLES,
    seed: int = 0,
) -> dict[str, float]:
    """Returns the sensitivity of every layer by its module.

    Args:
        tensor: returns a tensor of the checkpoint by its key, on the CPU, in the file's type.
        shapes: of the checkpoint's tensors by key.
        layout: of the checkpoint, which `can_run`.
        device: that runs the network.
        progress: progress and interrupt.
        samples: the inputs.
        seed: of the inputs.

    Raises:
        InterruptedRun: the run was stopped.
    """
    gradients = _Gradients(tensor, layout.layers, device, progress.check)
    network = _Network(gradients.read, shapes, layout.family, samples.side)
    generator = torch.Generator().manual_seed(seed)
    outputs = 0
    for number in range(samples.passes):
        progress.report(PHASE, number / samples.passes)
        # Every pass has steps of the whole schedule, and none twice.
        slots = torch.arange(samples.batch) * samples.passes + number + 0.5
        steps = slots * (STEPS / (samples.batch * samples.passes))
        with torch.enable_grad():
            output = network.run(steps.to(device), generator)
            v = torch.randn(output.shape, generator=generator).to(output)
            torch.autograd.backward(output, v)
        outputs += output.numel()
    progress.report(PHASE, 1.0)
    return gradients.means(outputs)


class _Reading(NamedTuple):
    """What a UNet reads of a text encoder; see `TextEncoder`."""

    skipped: int
    normed: bool


class _Gradients:
    """Reads weights, and adds up the squared norms of their gradients."""

    def __init__(
        self,
        tensor: Callable[[str], Tensor],
        layers: tuple[Layer, ...],
        device: torch.device,
        check: Callable[[], None],
    ) -> None:
        self._tensor, self._device, self._check = tensor, device, check
        self._layers: dict[str, list[Layer]] = {}
        for layer in layers:
            self._layers.setdefault(layer.key, []).append(layer)
        self._squares: dict[str, Tensor] = {}

    def read(self, key: str) -> Tensor:
        """Returns a tensor whose gradient, where it is a layer's, is squared and let go."""
        self._check()
        weight = self._tensor(key).to(self._device, torch.float32)
        if key in self._layers and torch.is_grad_enabled():
            weight = weight.detach().requires_grad_()
            weight.register_post_accumulate_grad_hook(partial(self._take, key))  # type: ignore[no-untyped-call]
        return weight

    def means(self, outputs: int) -> dict[str, float]:
        """Returns the mean squares by module, for gradients of so many outputs together.

        A layer that no output depends on has 0.
        """
        return {
            layer.module: float(self._squares.get(layer.module, 0.0))
            / (outputs * layer.m * layer.n)
            for layers in self._layers.values()
            for layer in layers
        }

    def _take(self, key: str, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        if gradient is None:
            return
        for layer in self._layers[key]:
            rows = gradient[slice(*layer.rows)] if layer.rows else gradient
            square = torch.linalg.vector_norm(rows, dtype=torch.float32).square()
            self._squares[layer.module] = self._squares.get(layer.module, 0) + square


class _Network:
    """A denoiser with its text encoders, and inputs for them."""

    def __init__(
        self,
        read: Callable[[str], Tensor],
        shapes: Mapping[str, Shape],
        family: Family,
        side: int,
    ) -> None:
        kind = _kind(family)
        (part,) = (part for part in family.parts if part.name == "unet")
        self._unet = UNet(read, shapes, part.prefix, _heads_of_sd1 if kind == "sd1" else _heads)
        self._encoders = [
            TextEncoder(read, shapes, part.prefix, *_ENCODERS[kind])
            for part in family.parts
            if part.name == "text_encoder" and any(key.startswith(part.prefix) for key in shapes)
        ]
        self._side, self._resolution = side, float(family.resolution)

    def run(
        self,
        steps: Tensor,  # (b,)
        generator: torch.Generator,
    ) -> Tensor:  # (b, 4, side, side)
        """Returns the outputs for pure noise and random prompts."""
        count, device = len(steps), steps.device
        shape = (count, self._unet.channels(), self._side, self._side)
        latents = torch.randn(shape, generator=generator).to(device).requires_grad_()
        encoded = [_encode(encoder, count, generator, device) for encoder in self._encoders]
        width = self._unet.context_width()
        if encoded:
            context = torch.cat([text.hidden for text in encoded], -1)
        else:  # a denoiser alone
            context = torch.randn(count, _TOKENS, width, generator=generator).to(device)
        pooled = next((text.pooled for text in encoded if text.pooled is not None), None)
        vector = self._vector(count, pooled, generator, device)
        return self._unet(latents, steps, context, vector)

    def _vector(
        self,
        count: int,
        pooled: Tensor | None,  # (count, width)
        generator: torch.Generator,
        device: torch.device,
    ) -> Tensor | None:  # (count, size)
        """Returns what SDXL reads beside the text: its pooled form, and sizes of the picture."""
        size = self._unet.vector_size()
        if size is None:
            return None
        if pooled is None:
            return torch.randn(count, size, generator=generator).to(device)
        side = self._resolution
        numbers = torch.tensor([side, side, 0.0, 0.0, side, side], device=device)
        numbers = numbers[: (size - pooled.shape[1]) // _NUMBER]
        sizes = time_embedding(numbers, _NUMBER).flatten().expand(count, -1)
        return torch.cat([pooled, sizes], 1)


_ENCODERS: Final[Mapping[str, _Reading]] = {
    "sd1": _Reading(skipped=0, normed=True),
    "sd2": _Reading(skipped=1, normed=True),
    "sdxl": _Reading(skipped=1, normed=False),
}
"""How the UNet of a family reads its text encoders, by the first word of the family's name."""


def _encode(
    encoder: TextEncoder, count: int, generator: torch.Generator, device: torch.device
) -> Encoded:
    """Returns what an encoder says of random prompts of all lengths, the first of them empty."""
    start, end = encoder.vocabulary - 2, encoder.vocabulary - 1
    size = (count, encoder.positions)
    tokens = torch.randint(max(start, 1), size, generator=generator)
    lengths = torch.linspace(0, encoder.positions - 2, count).long()
    places = torch.arange(encoder.positions)
    tokens[:, 0] = start
    tokens = torch.where(places > lengths[:, None], end, tokens)
    return encoder(tokens.to(device), (lengths + 1).to(device))


def _kind(family: Family) -> str:
    """Returns the first word of a family's name."""
    return family.name.partition("_")[0]


def _heads(channels: int) -> int:
    return max(channels // _HEAD, 1)


def _heads_of_sd1(channels: int) -> int:
    return math.gcd(channels, _HEADS_OF_SD1)
