"""Describes a family of generated checkpoints, and computes the numbers that follow from it.

Everything follows from the `FamilySpec`, tensor by tensor, whatever the order; no files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Treatment, position_ids
from hyper_merge.checkpoints.io.header import TensorInfo
from hyper_merge.synthetic.checkpoint_layouts import UNET_PREFIX

Encoder = Literal["same", "own", "frozen"]

_EMBEDDING_STD: Final = 0.02  # as CLIP is initialised
_NORM_STD: Final = 0.1
_BIAS_STD: Final = 0.02
_QUIET: Final = 1 / 3  # norms, biases, embeddings move less than the layers


@dataclass(frozen=True)
class FamilySpec:
    """The description of a family; the defaults are the real sizes of SD 1.x and SDXL.

    A layer `(m, n)` of checkpoint c is its base plus, in units of `size * norm of the base` times
    a log-normal amplitude per layer, times `scales[c]`,

        sum over i of mix[c, i] * latent_i  +  own * latent of c alone  +  noise * white noise,

    each term of norm about 1, each latent of rank `min(m, n, terms)` with the singular values
    j ** -alpha. Without `mix` a family with more checkpoints begins with the same ones.

    Attributes:
        count: Checkpoints.
        latents: Fine-tunes that they all mix.
        architecture: "sd1", "sd2" or "sdxl".
        width: Channels of the UNet's first level.
        context: Width of the text encoder; of SDXL's first one.
        second_context: Width of SDXL's second text encoder.
        vocabulary: Tokens of the text encoders.
        vae_width: Channels of the VAE's first level.
        alpha: Exponent of the singular values.
        terms: Rank of a latent at most.
        own: Norm of the part that one checkpoint alone has.
        noise: Norm of its white noise.
        spread: Standard deviation of the logarithm of the layers' amplitudes.
        size: Norm of a deviation from the base, as a fraction of the base's, in the median layer.
        seed: Of everything random.
        dtype: Of the written files.
        vae_differs: Whether the checkpoints' VAEs differ.
        mix: How much of each latent each checkpoint has, (count, latents); None for normal random
            numbers.
        scales: Size of each checkpoint's deviation in units of `size`; None for 1 each.
        encoder: How the text encoder moves: mixed as the UNet is ("same"), by random numbers of its
            "own", or not at all ("frozen").
        gain_spread: Standard deviation of the logarithm of the norms of the base's layers.
    """

    count: int = 4
    latents: int = 3
    architecture: str = "sd1"
    width: int = 320
    context: int = 768
    second_context: int = 1280
    vocabulary: int = 49408
    vae_width: int = 128
    alpha: float = 0.5
    terms: int = 320
    own: float = 0.3
    noise: float = 0.3
    spread: float = 0.8
    size: float = 0.05
    seed: int = 0
    dtype: torch.dtype = torch.float16
    vae_differs: bool = False
    mix: tuple[tuple[float, ...], ...] | None = None
    scales: tuple[float, ...] | None = None
    encoder: Encoder = "same"
    gain_spread: float = 0.0

    def __post_init__(self) -> None:
        lengths = [self.latents] * self.count
        if self.mix is not None and [len(row) for row in self.mix] != lengths:
            raise ValueError(f"mix: expected {self.count} rows of {self.latents}, got {self.mix}")
        if self.scales is not None and len(self.scales) != self.count:
            raise ValueError(f"scales: expected {self.count} numbers, got {self.scales}")
        if self.encoder not in get_args(Encoder):
            raise ValueError(f"encoder: expected {get_args(Encoder)}, got {self.encoder!r}")


NARROW: Final = FamilySpec(width=32, context=48, vocabulary=100, vae_width=16, terms=32)
"""All 1131 keys of the real layout in 20 MB a checkpoint."""


@dataclass(frozen=True)
class FamilyPlan:
    """A tensor that is to be made."""

    key: str
    info: TensorInfo
    treatment: Treatment

    @property
    def in_encoder(self) -> bool:
        """Tells whether it belongs to a text encoder."""
        return self.treatment is not Treatment.VAE and not self.key.startswith(UNET_PREFIX)


def mixture(
    spec: FamilySpec,
    *,
    in_encoder: bool = False,
) -> Tensor:  # (count, latents)
    """Returns how much of each latent fine-tune each checkpoint has, in all layers of a part."""
    has_own_mixture = in_encoder and spec.encoder == "own"
    if spec.mix is not None and not has_own_mixture:
        return torch.tensor(spec.mix).view(spec.count, spec.latents)
    name = "encoder mixture" if has_own_mixture else "mixture"
    rows = [
        torch.randn(spec.latents, generator=_generator(spec, f"{name} {c}"))
        for c in range(spec.count)
    ]
    return torch.stack(rows)


def weights(
    spec: FamilySpec, plan: FamilyPlan
) -> Iterator[Tensor]:  # count times (*shape), float32 or int64
    """Yields one tensor of each checkpoint in turn: only one of them need be in memory."""
    shape = plan.info.shape
    generator = _generator(spec, plan.key)
    if not plan.info.dtype.is_floating_point:
        yield from (position_ids(shape) for _ in range(spec.count))
        return
    base = _base(plan.key, shape, generator)
    if plan.treatment is Treatment.LAYER:
        yield from _layer_weights(spec, plan, base, generator)
        return
    step = _QUIET * spec.size * float(base.norm()) / math.sqrt(base.numel())
    for scale in _scales(spec):
        if _moves(spec, plan):
            yield torch.randn(shape, generator=generator).mul_(step * scale).add_(base)
        else:
            yield base


def _moves(spec: FamilySpec, plan: FamilyPlan) -> bool:
    """Returns whether a tensor differs between the checkpoints."""
    if plan.treatment is Treatment.VAE:
        return spec.vae_differs
    return not (plan.in_encoder and spec.encoder == "frozen")


def _scales(spec: FamilySpec) -> tuple[float, ...]:
    return spec.scales or (1.0,) * spec.count


def _layer_weights(
    spec: FamilySpec, plan: FamilyPlan, base: Tensor, generator: torch.Generator
) -> Iterator[Tensor]:  # count times (*shape)
    if spec.gain_spread:
        drawn = torch.randn((), generator=_generator(spec, f"gain {plan.key}"))
        base.mul_(math.exp(spec.gain_spread * float(drawn)))
    if not _moves(spec, plan):
        yield from (base for _ in range(spec.count))
        return
    weight = base.flatten(1)
    m, n = weight.shape
    amplitude = math.exp(spec.spread * float(torch.randn((), generator=generator)))
    unit = spec.size * float(base.norm()) * amplitude
    latents = [torch.mm(*_latent(spec, m, n, generator)) for _ in range(spec.latents)]
    rows = mixture(spec, in_encoder=plan.in_encoder).tolist()
    for row, scale in zip(rows, _scales(spec), strict=True):
        step = unit * scale
        # In place throughout: fresh memory costs as much as the arithmetic.
        noisy = torch.randn(m, n, generator=generator).mul_(step * spec.noise / math.sqrt(m * n))
        noisy.add_(weight).addmm_(*_latent(spec, m, n, generator), alpha=step * spec.own)
        for share, latent in zip(row, latents, strict=True):
            noisy.add_(latent, alpha=step * share)
        yield noisy.view(base.shape)


def _latent(
    spec: FamilySpec, m: int, n: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:  # (m, terms) and (terms, n): their product has norm about 1
    terms = min(m, n, spec.terms)
    values = torch.arange(1, terms + 1, dtype=torch.float32) ** -spec.alpha
    values /= values.norm() * math.sqrt(m * n)
    left = torch.randn(m, terms, generator=generator)
    return left * values, torch.randn(terms, n, generator=generator)


def _base(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:  # (*shape)
    noise = torch.randn(shape, generator=generator)
    if key.endswith("bias"):
        return noise.mul_(_BIAS_STD)
    if len(shape) == 1:
        return noise.mul_(_NORM_STD).add_(1)
    if "_embedding" in key:
        return noise.mul_(_EMBEDDING_STD)
    return noise.div_(math.sqrt(math.prod(shape[1:])))


def _generator(spec: FamilySpec, name: str) -> torch.Generator:
    """Returns a stream of random numbers that depends on the seed and the name alone."""
    digest = hashlib.sha256(f"{spec.seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
