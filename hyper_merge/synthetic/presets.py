"""Kinds of families as people's folders have them, by which methods are compared.

The rows are full-size; `narrow` gives the same structure in layers a fifth as wide.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from hyper_merge.synthetic.family import FamilySpec

_NARROWER: Final = 5  # times

KINDS: Final[dict[str, FamilySpec]] = {
    # Three latents with a slow spectrum, something that one checkpoint alone has, noise.
    "usual": FamilySpec(),
    "level": FamilySpec(spread=0.0, seed=1),
    # The text encoder is another mixture, as where it was trained apart from the UNet.
    "apart": FamilySpec(encoder="own", seed=2),
    # Layers of the base are unlike in norm, as training leaves them.
    "uneven": FamilySpec(gain_spread=0.5, seed=3),
    "two": FamilySpec(count=2, seed=4),
    "shared": FamilySpec(latents=2, alpha=1.0, own=0.1, noise=0.1, seed=5),
    "many": FamilySpec(count=12, latents=4, seed=6),
    "unrelated": FamilySpec(count=6, latents=0, own=1.0, seed=7),
    "flat": FamilySpec(alpha=0.0, terms=1280, noise=0.8, seed=8),
    "steep": FamilySpec(count=5, alpha=1.2, seed=9),
    "near_duplicates": FamilySpec(
        count=6,
        latents=2,
        own=0.1,
        noise=0.1,
        seed=10,
        mix=((1.5, 0.0), (1.5, 0.1), (1.4, 0.0), (0.0, 1.5), (0.1, 1.5), (0.0, 1.4)),
    ),
    "outlier": FamilySpec(
        count=5,
        seed=11,
        mix=((1.0, 0.5, 0.0), (1.0, -0.5, 0.0), (0.5, 1.0, 0.0), (1.5, 0.0, 0.0), (0.0, 0.0, 1.0)),
        scales=(1.0, 1.0, 1.0, 1.0, 4.0),
    ),
    "groups": FamilySpec(
        count=8,
        latents=4,
        seed=12,
        mix=(
            *((1.2, 0.6, 0.0, 0.0), (1.0, -0.6, 0.0, 0.0), (0.8, 1.0, 0.0, 0.0)),
            *((1.4, 0.0, 0.0, 0.0), (0.0, 0.0, 1.2, -0.8), (0.0, 0.0, 0.9, 0.9)),
            *((0.0, 0.0, 1.1, 0.3), (0.0, 0.0, 0.7, -0.4)),
        ),
    ),
    # Merges of three fine-tunes and nothing else: two dimensions along the checkpoints.
    "merges": FamilySpec(
        count=6,
        own=0.0,
        noise=0.0,
        seed=13,
        mix=(
            *((0.7, 0.3, 0.0), (0.5, 0.0, 0.5), (0.2, 0.6, 0.2)),
            *((0.34, 0.33, 0.33), (0.0, 0.25, 0.75), (0.9, 0.05, 0.05)),
        ),
    ),
}
"""By name; `usual` is the family of the README's figures."""


def narrow(spec: FamilySpec) -> FamilySpec:
    """Returns the structure in narrow layers of the real layout, about 75 MB a checkpoint."""
    sizes = replace(spec, width=64, context=160, vocabulary=100, vae_width=16)
    return replace(sizes, terms=spec.terms // _NARROWER)
