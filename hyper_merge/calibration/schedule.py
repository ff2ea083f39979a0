"""The noise schedule of Stable Diffusion, and steps that take noise away by it.

Sources: Rombach et al., "High-resolution image synthesis with latent diffusion models", 2022, for the
schedule; Song, Meng and Ermon, "Denoising diffusion implicit models", 2020, for the steps; Salimans and
Ho, "Progressive distillation for fast sampling of diffusion models", 2022, for v.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

STEPS: Final = 1000
"""Steps of the schedule of every family."""

_BETAS: Final = (0.00085, 0.012)  # of the first and of the last step


def signal_share(
    steps: Tensor,  # (b,)
) -> Tensor:  # (b, 1, 1, 1)
    """Returns the share of a picture in the square of noisy latents, from 1 to almost 0."""
    first, last = (beta**0.5 for beta in _BETAS)
    betas = torch.linspace(first, last, STEPS, dtype=torch.float64).square()
    shares = (1 - betas).cumprod(0).float().to(steps.device)  # not every device has float64
    return shares[steps.long().clamp(0, STEPS - 1)][:, None, None, None]


def less_noisy(
    latents: Tensor,  # (b, channels, height, width)
    output: Tensor,  # of a network for them, likewise
    steps: Tensor,  # (b,): of the latents
    next_steps: Tensor,  # (b,)
    *,
    predicts_v: bool,
) -> Tensor:  # (b, channels, height, width)
    """Returns the latents at earlier steps of the schedule.

    Args:
        latents: with the noise of their steps.
        output: what a network predicts for them.
        steps: of the schedule, of the latents.
        next_steps: of the schedule, of what is returned.
        predicts_v: whether the network predicts v instead of the noise.
    """
    share, next_share = signal_share(steps), signal_share(next_steps)
    if predicts_v:
        picture = share.sqrt() * latents - (1 - share).sqrt() * output
    else:
        picture = (latents - (1 - share).sqrt() * output) / share.sqrt()
    # Latents of pictures have entries of about unit size; errors at the first steps would make them larger.
    size = picture.square().mean((1, 2, 3), keepdim=True).sqrt()
    picture = picture / size.clamp(min=1.0)
    noise = (latents - share.sqrt() * picture) / (1 - share).sqrt()
    return next_share.sqrt() * picture + (1 - next_share).sqrt() * noise
