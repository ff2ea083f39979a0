"""Puts a denoiser and its text encoders together as a family does, with inputs of random numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor

from hyper_merge.calibration.schedule import STEPS, less_noisy
from hyper_merge.calibration.text_encoders import Encoded, TextEncoder
from hyper_merge.calibration.unet import (
    Observe,
    Read,
    UNet,
    heads_of_size,
    ignore,
    is_whole,
    time_embedding,
)
from hyper_merge.checkpoints.architectures.spec import Family
from hyper_merge.checkpoints.io.header import Shape

_TOKENS: Final = 77
_HEADS_OF_SD1: Final = 8
_HEAD: Final = 64  # channels of a head of later families
_NUMBER: Final = 256  # entries by which SDXL reads a number, such as the height of the picture
_SIZES: Final = 6  # such numbers that SDXL reads: original size, corner, target size
_NUMBERS: Final = (0, 5, _SIZES)
_SCORE: Final = 6.0  # of aesthetics, which the refiner reads in place of a target size
_WITHOUT: Final = ("sdxl_edm", "sdxl_edm_v")  # they read noise levels in another form


class _Reading(NamedTuple):
    """What a UNet reads of a text encoder; see `TextEncoder`."""

    skipped: int
    normed: bool


_ENCODERS: Final[Mapping[str, _Reading]] = {
    "sd1": _Reading(skipped=0, normed=True),
    "sd2": _Reading(skipped=0, normed=True),  # the 24th layer is idle
    "sdxl": _Reading(skipped=1, normed=False),
}
"""How the UNet of a family reads its text encoders, by the first word of the family's name."""


class Network:
    """A denoiser with its text encoders, and inputs for them."""

    def __init__(
        self,
        read: Read,
        shapes: Mapping[str, Shape],
        family: Family,  # one of which `is_known`
        observe: Observe = ignore,
    ) -> None:
        kind = _kind(family)
        # Loaders build no layers for weights that nobody runs.
        shapes = {key: shape for key, shape in shapes.items() if not key.startswith(family.idle)}
        (part,) = (part for part in family.parts if part.name == "unet")
        heads_of = _heads_of_sd1 if kind == "sd1" else _heads
        self._unet = UNet(read, shapes, part.prefix, heads_of, observe)
        self._encoders = [
            TextEncoder(read, shapes, part.prefix, *_ENCODERS[kind], observe)
            for part in family.parts
            if part.name == "text_encoder" and any(key.startswith(part.prefix) for key in shapes)
        ]
        self._resolution, self._predicts_v = float(family.resolution), family.predicts_v
        self._shapes, self._prefix = shapes, part.prefix

    @property
    def is_whole(self) -> bool:
        """Whether the file has all tensors, and they fit together."""
        if not is_whole(self._shapes, self._prefix):
            return False
        if not all(encoder.is_whole for encoder in self._encoders):
            return False
        width = sum(encoder.width for encoder in self._encoders)
        return width in (0, self._unet.context_width()) and self._numbers() in _NUMBERS

    def _numbers(self) -> int:
        """Returns how many numbers the network reads beside the pooled text; 0 without such a text."""
        pooled = sum(encoder.width for encoder in self._encoders if encoder.pools)
        size = self._unet.vector_size()
        return (size - pooled) // _NUMBER if size and pooled else 0

    def run(
        self,
        steps: Tensor,  # (b,)
        side: int,
        generator: torch.Generator,
        latents: Tensor | None = None,  # (b, channels, side, side)
    ) -> Tensor:  # (b, 4, side, side)
        """Returns the outputs for random prompts and latents, pure noise where none are given.

        Args:
            steps: of the schedule, 0 to 1000, on the device that computes.
            side: height and width of the latents.
            generator: of the random numbers, on the CPU: they are the same for every device. The prompts
                do not depend on whether latents are given.
            latents: what the network sees.
        """
        noise = self._noise(steps, side, generator)
        context, vector = self._conditions(steps, generator)
        seen = noise if latents is None else latents.detach()
        return self._unet(seen.requires_grad_(), steps, context, vector)

    @torch.no_grad()
    def draw(
        self,
        steps: Tensor,  # (b,)
        side: int,
        generator: torch.Generator,
        runs: int,
    ) -> Tensor:  # (b, channels, side, side)
        """Returns latents with the noise of the given steps, drawn from pure noise for random prompts.

        Channels that the network reads beside those of a picture stay noise.

        Args:
            steps: see `run`, as for the next two.
            side: height and width of the latents.
            generator: that gives `run` the same prompts.
            runs: of the network; pictures take their form step by step.
        """
        latents = self._noise(steps, side, generator)
        context, vector = self._conditions(steps, generator)
        now = torch.full_like(steps, STEPS - 1.0)
        for left in range(runs, 0, -1):
            output = self._unet(latents, now, context, vector)
            then = now + (steps - now) / left
            picture, beside = latents[:, : output.shape[1]], latents[:, output.shape[1] :]
            picture = less_noisy(picture, output, now, then, predicts_v=self._predicts_v)
            latents, now = torch.cat([picture, beside], 1), then
        return latents

    def _noise(self, steps: Tensor, side: int, generator: torch.Generator) -> Tensor:
        shape = (len(steps), self._unet.channels(), side, side)
        return torch.randn(shape, generator=generator).to(steps.device)

    def _conditions(
        self, steps: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:  # (b, tokens, width), (b, size)
        """Returns what the network reads beside the latents, for random prompts."""
        count, device = len(steps), steps.device
        encoded = [_encode(encoder, count, generator, device) for encoder in self._encoders]
        width = self._unet.context_width()
        if encoded:
            context = torch.cat([text.hidden for text in encoded], -1)
        else:  # a denoiser alone
            context = torch.randn(count, _TOKENS, width, generator=generator).to(device)
            context.requires_grad_(torch.is_grad_enabled())
        pooled = next((text.pooled for text in encoded if text.pooled is not None), None)
        vector = self._vector(count, pooled, generator, device)
        if vector is not None and not vector.requires_grad:
            vector.requires_grad_(torch.is_grad_enabled())
        return context, vector

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
        last = [side, side] if self._numbers() == _SIZES else [_SCORE]
        numbers = torch.tensor([side, side, 0.0, 0.0, *last], device=device)
        sizes = time_embedding(numbers, _NUMBER).flatten().expand(count, -1)
        return torch.cat([pooled, sizes], 1)


def is_known(family: Family) -> bool:
    """Tells whether the networks of a family can be run here."""
    return _kind(family) in _ENCODERS and family.name not in _WITHOUT


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
    return heads_of_size(channels, _HEAD)


def _heads_of_sd1(channels: int) -> int:
    return math.gcd(channels, _HEADS_OF_SD1)
